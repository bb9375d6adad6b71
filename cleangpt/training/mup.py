"""muP: initialization and learning rates under which the optimal rate does not depend on the width of the model.

Yang et al. 2022, "Tensor Programs V: Tuning large neural networks via zero-shot hyperparameter transfer", table 3. It
is applied from outside the model (design rule 7): a factor on each parameter's initial values and one on its learning
rate, and nothing in the forward pass, so that checkpoints are those of a plain model.

A dimension of a matrix is a width if it differs in the same model at the base width. With r = width / base width:

parameters                          initial values   AdamW   Muon
embeddings, biases, gains           1                1       -
matrices between two widths         1/√r             1/r     1/√r
heads, routers: to a fixed size     1/r              1/r     1/r
the last norm before a tied head    1/r              1/r     -

A tied head would need its logits multiplied by 1/r (table 8 there). The gain of the norm before it does the same: AdamW
is invariant to the scale of a gradient, so a gain that starts at 1/r and learns at 1/r of the rate is equivalent.

Muon's updates have the RMS of AdamW's at any width, and so a spectral norm that grows as √r. Features change equally at
all widths if that norm is √(rows / columns) (Yang et al. 2023, "A spectral condition for feature learning", condition
1), which gives the last column. The heads of a fused query, key and value count separately: their rows are fixed.

A wider model has more heads of the same size, so attention's own scale is unchanged.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from cleangpt.config import ModelConfig, OptimizerConfig
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.blocks import block_numbers, hidden_matrices
from cleangpt.models.meta import on_meta


@dataclass(frozen=True)
class MuPScale:
    """Factors on a parameter's initial values and on its learning rate."""

    initial: float = 1.0
    lr: float = 1.0


def mup_scales(config: ModelConfig, optimizer: OptimizerConfig, heads: Collection[str] = ()) -> dict[str, MuPScale]:
    """The muP factors for each parameter of a model with these scalar heads; empty without `optimizer.base_dim`.

    Raises:
        UserError: the model cannot have the base width, has convolutions, or neither an untied head nor a `final_norm`.
    """
    if optimizer.base_dim is None:
        return {}
    with on_meta():
        model, base = build_model(config, heads), build_model(config.at_width(optimizer.base_dim), heads)
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        raise UserError(f"optimizer.base_dim is {optimizer.base_dim}; allowed for a model with convolutions: None")
    by_muon = hidden_matrices(model) if optimizer.muon.lr is not None else set()
    looked_up = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    factors = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in looked_up:
            factors[name] = MuPScale()
        else:
            shape, base_shape = _matrix_shape(model, name), _matrix_shape(base, name)
            factors[name] = _matrix_factor(shape, base_shape, name in by_muon)
    inside = block_numbers(model)
    scalar = {name for name in factors if name.startswith("heads.")}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if all(name in inside or name in scalar or name.startswith("vision.") for name in linear):
        # What scalar heads read has the factor already.
        factors |= _tied_head(factors, optimizer.base_dim / cast(Any, config).dim) | dict.fromkeys(scalar, MuPScale())
    return factors


def _matrix_shape(model: LanguageModel, name: str) -> tuple[int, int, int]:
    """Rows and columns of a parameter `(..., rows, columns)`, and the rows of each matrix stacked in it."""
    rows, columns = model.get_parameter(name).shape[-2:]
    return rows, columns, rows // model.stacked_matrices(name)


def _matrix_factor(shape: tuple[int, int, int], base: tuple[int, int, int], muon: bool) -> MuPScale:
    """The factor of a matrix, from its shape and that at the base width, both from `_matrix_shape`."""
    rows, columns, own_rows = (now / then for now, then in zip(shape, base, strict=True))
    initial = min(1.0, math.sqrt(rows / columns)) / math.sqrt(columns)
    if not muon:
        return MuPScale(initial, 1 / columns)
    growth = math.sqrt(max(shape[1:]) / max(base[1:]))  # of the spectral norm of an update
    return MuPScale(initial, math.sqrt(own_rows / columns) / growth)


def _tied_head(factors: Mapping[str, MuPScale], factor: float) -> dict[str, MuPScale]:
    """Applies the `factor` of a tied head to the last norm instead.

    Raises:
        UserError: there is no such norm.
    """
    norm = [name for name in factors if name.startswith("final_norm.")]
    if not norm:
        raise UserError("optimizer.base_dim needs a model with an untied head, or a `final_norm` before a tied one")
    return dict.fromkeys(norm, MuPScale(factor, factor))


@torch.no_grad()
def scale_init(model: LanguageModel, factors: Mapping[str, MuPScale]) -> None:
    """Multiplies initial weights by their factors, which changes the standard deviation of normal ones."""
    for name, parameter in model.named_parameters():
        if name in factors:
            parameter.mul_(factors[name].initial)
