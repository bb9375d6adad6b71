"""The loop over macro-batches, and everything it must remember."""
