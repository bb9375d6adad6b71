"""Rollouts: a policy acts in an environment, and its rewarded answers become batches."""
