"""From tokens on disk to batches: tokenizers, datasets, the order of samples, mixtures, batches."""
