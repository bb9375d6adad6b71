"""Checkpoint to metrics: loss, perplexity, bits per byte, rewards of tasks."""
