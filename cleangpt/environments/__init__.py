"""What a policy acts in, and what a checkpoint is scored by; one file per environment."""
