"""Checkpoints from and to other programs: Hugging Face both ways, GGUF out.

Weights are read from safetensors and structure from JSON, so nothing downloaded is ever executed.
"""
