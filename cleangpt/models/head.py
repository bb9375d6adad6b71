"""From features to scores of targets: log-probabilities, with a few tokens' logits at a time where asked.

For a large vocabulary, logits are more than all else that a step keeps. In chunks, they are dropped as soon as what is
made of them is known. A sum of log-probabilities has one factor for its whole gradient, so the gradients by features
and head are taken in the forward pass and nothing is computed twice; scores of single tokens, whose gradients may have
any factors, are computed again in the backward pass (Chen et al. 2016, "Training deep nets with sublinear memory
cost").
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cleangpt.data.batch import IGNORED

ToLogits = Callable[[Tensor], Tensor]


class TokenScores(NamedTuple):
    """What a model thinks of targets, float32: `(batch, seq)`, 0 where a target is IGNORED; or sums over all."""

    logprobs: Tensor
    """Log-probability of each target, in nats."""
    log_z: Tensor | None = None
    """Logarithm of the sum of the exponentials of the logits."""
    entropy: Tensor | None = None
    """Of the distribution that the target is from, in nats."""
    mean_logprob: Tensor | None = None
    """Mean log-probability over the vocabulary, for label smoothing."""
    heads: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """What other heads give at each position `(batch, seq)`, by their names; never summed."""


SCORES = ("log_z", "entropy", "mean_logprob")


def token_scores(
    features: Tensor,
    targets: Tensor,
    to_logits: ToLogits,
    parameters: Sequence[Tensor],
    asked: Collection[str] = (),
    summed: bool = False,
    chunk: int | None = None,
) -> TokenScores:
    """Scores of `targets` `(batch, seq)` given `features` `(batch, seq, dim)`.

    Args:
        features: after the final norm.
        targets: ids, IGNORED where there is none.
        to_logits: the head.
        parameters: of the head.
        asked: which of SCORES to compute besides log-probabilities.
        summed: sums over all targets, 0-dim.
        chunk: tokens whose logits exist at a time; None: all.
    """
    rows, expected = features.flatten(0, -2), targets.flatten()
    if chunk is None:
        found = _scores(to_logits(features), targets, asked, summed)
        return TokenScores(**found)
    if summed and not asked and torch.is_grad_enabled():
        apply: Callable[..., Tensor] = cast(Any, _SummedInChunks).apply
        return TokenScores(apply(chunk, to_logits, expected, rows, *parameters))

    def part(row: Tensor, target: Tensor) -> dict[str, Any]:
        return _scores(to_logits(row), target, asked, summed)

    again = torch.is_grad_enabled()
    parts = [
        cast(dict[str, Any], checkpoint(part, row, target, use_reentrant=False)) if again else part(row, target)
        for row, target in _chunks(rows, expected, chunk)
    ]
    joined: dict[str, Any] = {}
    for name in parts[0]:
        pieces = [found[name] for found in parts]
        joined[name] = torch.stack(pieces).sum() if summed else torch.cat(pieces).view_as(targets)
    return TokenScores(**joined)


def _scores(logits: Tensor, targets: Tensor, asked: Collection[str], summed: bool) -> dict[str, Any]:
    """Log-probabilities of targets of any shape, and what is asked for besides."""
    flat, expected = logits.flatten(0, -2).float(), targets.flatten()
    reduction = "sum" if summed else "none"
    found: dict[str, Any] = {"logprobs": -F.cross_entropy(flat, expected, ignore_index=IGNORED, reduction=reduction)}
    if asked:
        log_z, counts = flat.logsumexp(dim=-1), expected != IGNORED
        known: dict[str, Callable[[], Tensor]] = {
            "log_z": lambda: log_z,
            "entropy": lambda: log_z - ((flat - log_z[:, None]).exp() * flat).sum(dim=-1),
            "mean_logprob": lambda: flat.mean(dim=-1) - log_z,
        }
        found |= {name: torch.where(counts, known[name](), 0.0) for name in asked}
    if summed:
        return {name: score.sum() for name, score in found.items()}
    return {name: score.view_as(targets) for name, score in found.items()}


def _chunks(features: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(features), chunk):
        yield features[start : start + chunk], targets[start : start + chunk]


class _SummedInChunks(torch.autograd.Function):
    """The sum of log-probabilities, and with it already its gradients by features and by parameters of the head."""

    @staticmethod
    def forward(
        ctx: Any, chunk: int, to_logits: ToLogits, targets: Tensor, features: Tensor, *parameters: Tensor
    ) -> Tensor:
        for_features, *for_parameters = ctx.needs_input_grad[3:]
        trained = [parameter for parameter, needed in zip(parameters, for_parameters, strict=True) if needed]
        gradients = [torch.zeros_like(parameter) for parameter in trained]
        feature_gradients, sums = [], []
        for rows, expected in _chunks(features, targets, chunk):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_(for_features)
                total = _scores(to_logits(rows), expected, (), summed=True)["logprobs"]
            found = list(torch.autograd.grad(total, [rows, *trained] if for_features else trained))
            feature_gradients += [found.pop(0)] if for_features else []
            for gradient, part in zip(gradients, found, strict=True):
                gradient += part
            sums.append(total.detach())
        ctx.feature_gradient = torch.cat(feature_gradients) if for_features else None
        remaining = iter(gradients)
        ctx.parameter_gradients = [next(remaining) if needed else None for needed in for_parameters]
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients = [ctx.feature_gradient, *ctx.parameter_gradients]
        scaled = [None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients]
        return (None, None, None, *scaled)
