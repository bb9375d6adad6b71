"""Training: the loop over macro-batches, its state, and how a run is put together."""
