"""From tokens on disk to batches: tokenizers, the token store, the order of samples, batches."""
