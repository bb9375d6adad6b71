"""The files of a run: snapshots, checkpoints, and the run folder itself."""
