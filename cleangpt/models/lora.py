"""LoRA adapters, added to linear layers from outside the model.

Hu et al. 2021, "LoRA: Low-rank adaptation of large language models", section 4.1: a layer's weight W is frozen, and
W + alpha / rank · B A replaces it, where A `(rank, in_features)` and B `(out_features, rank)` are trained. The layer
keeps its name, so that the model's plans and files stay as they are; its adapter is a child module called `lora`.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import LoRAConfig
from cleangpt.models.moe import MixtureOfExperts

CHILD = "lora"
"""Name of the adapter within its layer."""


class Adapter(nn.Module):
    """A low-rank addition to the output of one linear layer; B is initialized to zero, so it starts as none."""

    enabled: bool = True
    """Whether the layer uses it."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        weight = layer.weight
        self.a = nn.Parameter(torch.empty(rank, layer.in_features, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.empty(layer.out_features, rank, dtype=weight.dtype, device=weight.device))
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Initializes A uniformly within ±1 / sqrt(in_features), as the authors' code does, and B to 0."""
        if name == "a":
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input `(..., in_features)` to an addition to its output `(..., out_features)`."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b) * self.scale


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that can get adapters, by name: all but the routers of mixtures of experts."""
    routers = {id(module.router) for module in model.modules() if isinstance(module, MixtureOfExperts)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in routers
    }


def add_adapter(layer: nn.Linear, config: LoRAConfig) -> None:
    """Adds an adapter to a layer; `config.rank` is not None."""
    assert config.rank is not None
    layer.add_module(CHILD, Adapter(layer, config.rank, config.alpha / config.rank, config.dropout))
    layer.register_forward_hook(_add)


def _add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter = layer.get_submodule(CHILD)
    return output + adapter(inputs[0]) if adapter.enabled else output


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what it would without its adapters: what they were trained from."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return f".{CHILD}." in f".{name}"


def split_adapters(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict, split into the base model's weights and the adapters'."""
    adapters = {name: weight for name, weight in weights.items() if is_adapter(name)}
    return {name: weight for name, weight in weights.items() if name not in adapters}, adapters


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of a model without adapters that computes the same.

    Args:
        weights: the base model's, from `split_adapters`.
        adapters: the adapters', from `split_adapters`.
        scale: alpha / rank.
    """
    merged = dict(weights)
    for name, a in adapters.items():
        if name.endswith(f".{CHILD}.a"):
            layer = name.removesuffix(f".{CHILD}.a")
            b = adapters[f"{layer}.{CHILD}.b"]
            merged[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * b @ a
    return merged
