"""Checkpoints of others in, ours out: Hugging Face both ways, GGUF out.

Weights are read from safetensors and structure from JSON, so nothing that was downloaded is ever executed.
"""
