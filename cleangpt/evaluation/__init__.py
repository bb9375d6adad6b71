"""Checkpoint to figures: loss, perplexity, bits per byte, task scores."""
