"""From a checkpoint to metrics: loss, perplexity, bits per byte, task rewards."""
