"""Architectures: token ids to logits. One file each; registering is one line here.

A model is a plain `nn.Module` built from its configuration alone, with `forward(tokens (batch, seq)) -> logits
(batch, seq, vocab)`. Where it has `flops_per_token(seq_len)` and `activation_bytes(batch, seq_len)`, these are shown
before training and used for the MFU. One whose `forward` takes a `reduce` lets the loss be computed in chunks
(`objectives/chunks.py`). It knows nothing of devices, precision or training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

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


def model_class(config: ModelConfig) -> type[nn.Module]:
    """The architecture that a configuration is of."""
    for config_class, architecture in MODELS.values():
        if type(config) is config_class:
            return architecture
    raise TypeError(f"{type(config).__name__} is not registered in MODELS")


def build_model(config: ModelConfig) -> nn.Module:
    """The untrained model of a configuration whose `vocab_size` is known."""
    return model_class(config)(config)


class NothingDrawn(TorchFunctionMode):
    """A context in which models have no initial values; what stands in their memory is left over from others."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of PyTorch, unless it is one of `torch.nn.init`."""
        if getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which models have shapes alone. To draw nothing, PyTorch would load its compiler first."""
    with torch.device("meta"), NothingDrawn():
        yield


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """FLOPs to train a model on one token: by its own account, else 6 per parameter; less what frozen layers spare."""
    if hasattr(model, "flops_per_token"):
        own: int = cast(Any, model).flops_per_token(seq_len)
    else:
        own = 6 * sum(parameter.numel() for parameter in model.parameters())
    return own - _spared_flops(model)


def _spared_flops(model: nn.Module) -> int:
    """FLOPs per token that frozen linear layers do not take: 2 per weight for its gradient, and 2 for that of the
    inputs where all that stands before in the model is frozen too. A frozen head that is the embedding counts whole."""
    spared, below = 0, True
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        below = below and not any(parameter.requires_grad for parameter in own)
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            spared += (4 if below else 2) * module.weight.numel()
    return spared
