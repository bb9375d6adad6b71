"""Architectures: token ids to logits. One file each; registering is one line here.

A model is a plain `nn.Module` built from its configuration alone, with `forward(tokens (batch, seq)) -> logits
(batch, seq, vocab)`. Where it has `flops_per_token(seq_len)` and `activation_bytes(batch, seq_len)`, these are shown
before training and used for the MFU. It knows nothing of devices, precision or training.
"""

from typing import Any, cast

from torch import nn

from cleangpt.config import ModelConfig
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import Llama, LlamaConfig

MODELS: dict[str, tuple[type[ModelConfig], type[nn.Module]]] = {
    "gpt": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}


def model_kinds() -> dict[str, type[ModelConfig]]:
    """The configuration class of every registered architecture, by its name."""
    return {name: config for name, (config, _) in MODELS.items()}


def build_model(config: ModelConfig) -> nn.Module:
    """The untrained model of a configuration whose `vocab_size` is known."""
    for config_class, model_class in MODELS.values():
        if type(config) is config_class:
            return model_class(config)
    raise TypeError(f"{type(config).__name__} is not registered in MODELS")


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """FLOPs to train a model on one token: by its own account, else 6 per parameter."""
    if hasattr(model, "flops_per_token"):
        own: int = cast(Any, model).flops_per_token(seq_len)
        return own
    return 6 * sum(parameter.numel() for parameter in model.parameters())
