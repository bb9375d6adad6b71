"""Environments: tasks with rewards, to score checkpoints and to train policies; one file per environment."""
