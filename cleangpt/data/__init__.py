"""From text to batches: tokenizers, datasets, the order of samples, mixtures, batches."""
