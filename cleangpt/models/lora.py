"""Low-rank adapters, added to linear layers from outside the model (design rule 7).

Hu et al. 2021, "LoRA: Low-rank adaptation of large language models", section 4.1: a layer's weight W stays, and
W + alpha / rank · B A is learned in its place, where A has `rank` rows and B as many columns. The layer keeps its name,
so that plans, names and files of the model stay; its adapter is a child of it, called `lora`.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import LoRAConfig
from cleangpt.models.moe import MixtureOfExperts

CHILD = "lora"
"""An adapter's name in its layer."""


class Adapter(nn.Module):
    """What is added to the output of one linear layer; nothing before training, since B begins at zero."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        weight = layer.weight
        self.a = nn.Parameter(torch.empty(rank, layer.in_features, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.empty(layer.out_features, rank, dtype=weight.dtype, device=weight.device))
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Draws A as the paper's authors do in their code, evenly within ±1 / sqrt(in_features); B is zero."""
        if name == "a":
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input `(..., in_features)` to what is added to its output `(..., out_features)`."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b) * self.scale


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may have adapters, by name: all but the routers of mixtures of experts."""
    routers = {id(module.router) for module in model.modules() if isinstance(module, MixtureOfExperts)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in routers
    }


def add_adapter(layer: nn.Linear, config: LoRAConfig) -> None:
    """Gives a layer its adapter; `config.rank` is known."""
    assert config.rank is not None
    layer.add_module(CHILD, Adapter(layer, config.rank, config.alpha / config.rank, config.dropout))
    layer.register_forward_hook(_add)


def _add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = layer.get_submodule(CHILD)(inputs[0])
    return output + added


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a part of an adapter."""
    return f".{CHILD}." in f".{name}"


def split_adapters(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict without adapters, and that of the adapters."""
    adapters = {name: weight for name, weight in weights.items() if is_adapter(name)}
    return {name: weight for name, weight in weights.items() if name not in adapters}, adapters


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of a plain model that computes what base and adapters do together.

    Args:
        weights: of the base, from `split_adapters`.
        adapters: likewise.
        scale: alpha / rank.
    """
    merged = dict(weights)
    for name, a in adapters.items():
        if name.endswith(f".{CHILD}.a"):
            layer = name.removesuffix(f".{CHILD}.a")
            b = adapters[f"{layer}.{CHILD}.b"]
            merged[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * b @ a
    return merged
