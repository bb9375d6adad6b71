"""The loss of a batch without all of its logits at once, which for a large vocabulary are more than all else."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

LossOf = Callable[[Tensor, Tensor], Tensor]
"""The summed loss of logits `(tokens, vocab)` and targets `(tokens,)`."""


def loss_in_chunks(model: nn.Module, inputs: Tensor, targets: Tensor, loss_of: LossOf, chunk: int) -> Tensor:
    """The summed loss of `targets` `(batch, seq)` after `inputs` `(batch, seq)`, by the logits of `chunk` tokens.

    The model gives its features to a function instead of their logits (`reduce`, see `models/`). Logits and their
    gradients are dropped as soon as the gradients of features and head are known, which is in the forward pass; so
    nothing is computed twice. Results are those of the whole, up to rounding.
    """

    def reduce(features: Tensor, to_logits: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Tensor:
        rows, expected = features.flatten(0, -2), targets.flatten()
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = cast(Any, _InChunks).apply
            return apply(loss_of, chunk, to_logits, expected, rows, *parameters)
        parts = _pairs(rows, expected, chunk)
        return torch.stack([loss_of(to_logits(row), target) for row, target in parts]).sum()

    loss: Tensor = model(inputs, reduce=reduce)
    return loss


def _pairs(features: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(features), chunk):
        yield features[start : start + chunk], targets[start : start + chunk]


class _InChunks(torch.autograd.Function):
    """The loss, and with it already its gradients by features `(tokens, dim)` and by the parameters of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: LossOf,
        chunk: int,
        to_logits: Callable[[Tensor], Tensor],
        targets: Tensor,
        features: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        of_features, *of_parameters = ctx.needs_input_grad[4:]
        trained = [parameter for parameter, needed in zip(parameters, of_parameters, strict=True) if needed]
        gradients = [torch.zeros_like(parameter) for parameter in trained]
        by_features, losses = [], []
        for rows, expected in _pairs(features, targets, chunk):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_(of_features)
                loss = loss_of(to_logits(rows), expected)
            sources = [rows, *trained] if of_features else trained
            found = list(torch.autograd.grad(loss, sources))
            by_features += [found.pop(0)] if of_features else []
            for gradient, part in zip(gradients, found, strict=True):
                gradient += part
            losses.append(loss.detach())
        ctx.of_features = torch.cat(by_features) if of_features else None
        left = iter(gradients)
        ctx.of_parameters = [next(left) if needed else None for needed in of_parameters]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients = [ctx.of_features, *ctx.of_parameters]
        return (
            None,
            None,
            None,
            None,
            *(None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients),
        )
