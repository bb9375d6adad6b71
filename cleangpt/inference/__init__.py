"""Checkpoint to text."""
