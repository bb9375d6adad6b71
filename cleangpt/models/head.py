"""From features to scores of targets, such as log-probabilities; on request with the logits of a few tokens at a time.

With a large vocabulary, the logits take more memory than everything else in a training step. In chunks, they are freed
as soon as the scores are known. The gradient of a *sum* of log-probabilities has one factor for all tokens, so the
forward pass computes the gradients of features and head right away and nothing is computed twice. Scores of single
tokens may get any gradient, so the backward pass recomputes their logits (Chen et al. 2016, "Training deep nets with
sublinear memory cost").
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cleangpt.data.batch import IGNORED

ToLogits = Callable[[Tensor], Tensor]


class TokenScores(NamedTuple):
    """Scores of targets in float32: `(batch, seq)`, 0 where a target is IGNORED; or their sums, 0-dim.

    A tuple, since DDP and FSDP look for the gradients of what a model returns in tuples and dicts.
    """

    logprobs: Tensor
    """Log-probability of each target, in nats."""
    log_z: Tensor | None = None
    """log Z, where Z is the sum of the exponentials of the logits."""
    entropy: Tensor | None = None
    """Entropy of the predicted distribution, in nats."""
    mean_logprob: Tensor | None = None
    """Log-probability averaged over the vocabulary, in nats; for label smoothing."""
    heads: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """Outputs of scalar heads `(batch, seq)` at every position, IGNORED or not, by name; never summed."""


def gather_positions(features: Tensor, positions: Tensor) -> Tensor:
    """The features `(batch, seq, dim)` at `positions` `(batch, count)` of each sequence: `(batch, count, dim)`; or at
    `positions` `(count,)` of the flattened batch: `(count, dim)`."""
    if positions.ndim == 1:
        return features.flatten(0, -2).index_select(0, positions)
    return features.gather(1, positions[..., None].expand(*positions.shape, features.shape[-1]))


def target_positions(targets: Tensor) -> Tensor:
    """The positions `(count,)` of the flattened batch that have a target."""
    return (targets != IGNORED).flatten().nonzero()[:, 0]


def head_outputs(heads: nn.ModuleDict, features: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """The outputs `(...)` of those scalar heads that are named, float32, from features `(..., dim)`."""
    return {name: heads[name](features).squeeze(-1).float() for name in names if name in heads}


OPTIONAL_SCORES = ("log_z", "entropy", "mean_logprob")
"""Fields of `TokenScores` that are computed on request."""


def token_scores(
    features: Tensor,
    targets: Tensor,
    to_logits: ToLogits,
    head_parameters: Sequence[Tensor],
    names: Collection[str] = (),
    summed: bool = False,
    *,
    chunk: int | None = None,
    compiled: bool = False,
    skip_ignored: bool = True,
) -> TokenScores:
    """Scores of targets.

    Args:
        features: after the final norm `(batch, seq, dim)`.
        targets: ids `(batch, seq)`, int64, IGNORED where there is none.
        to_logits: the head: `(..., dim)` to `(..., vocab)`.
        head_parameters: the parameters of `to_logits`.
        names: which of OPTIONAL_SCORES to compute as well.
        summed: return sums over all targets.
        chunk: tokens whose logits are in memory at a time; None: all of them.
        compiled: whether to compile what comes after the logits, which then takes fewer passes over them.
        skip_ignored: compute no logits of tokens without a target where that is cheap to know: on a CPU, since an
            accelerator would have to wait for their number, and uncompiled. Not where features are sharded along the
            sequence, as under tensor parallelism.

    Raises:
        ValueError: a name is not one of OPTIONAL_SCORES.
    """
    for name in names:
        if name not in OPTIONAL_SCORES:
            raise ValueError(f"{name!r} is neither a score nor a head of the model; scores: {OPTIONAL_SCORES}")
    eager = not compiled and not torch.compiler.is_compiling()
    if skip_ignored and eager and features.device.type == "cpu":
        positions = target_positions(targets)
        if len(positions) < targets.numel():
            kept, expected = gather_positions(features, positions), targets.flatten()[positions]
            found = token_scores(
                kept, expected, to_logits, head_parameters, names, summed, chunk=chunk, skip_ignored=False
            )
            return found if summed else _spread(found, positions, targets.shape)
    compute: Callable[..., dict[str, Any]] = fused(_scores) if compiled else _scores
    if chunk is None:
        return TokenScores(**compute(to_logits(features), targets, names, summed))
    rows, expected = features.flatten(0, -2), targets.flatten()
    differentiable = torch.is_grad_enabled()
    if summed and not names and differentiable:
        apply: Callable[..., Tensor] = cast(Any, _ChunkedSum).apply
        return TokenScores(apply(chunk, compiled, to_logits, expected, rows, *head_parameters))

    def score(rows: Tensor, expected: Tensor) -> dict[str, Any]:
        return compute(to_logits(rows), expected, names, summed)

    parts = [
        checkpoint(score, *part, use_reentrant=False) if differentiable else score(*part)
        for part in _chunks(rows, expected, chunk)
    ]
    joined: dict[str, Any] = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        joined[name] = torch.stack(pieces).sum() if summed else torch.cat(pieces).view_as(targets)
    return TokenScores(**joined)


def _spread(scores: TokenScores, positions: Tensor, shape: Sequence[int]) -> TokenScores:
    """Scores of tokens at `positions` of a flattened batch in its shape, 0 elsewhere."""
    everywhere: dict[str, Any] = {
        name: score.new_zeros(math.prod(shape)).index_copy(0, positions, score).view(*shape)
        for name, score in scores._asdict().items()
        if isinstance(score, Tensor)
    }
    return scores._replace(**everywhere)


def _scores(logits: Tensor, targets: Tensor, names: Collection[str], summed: bool) -> dict[str, Any]:
    """Log-probabilities and the scores `names` of logits `(..., vocab)` and targets `(...)`."""
    flat, expected = logits.flatten(0, -2).float(), targets.flatten()
    reduction = "sum" if summed else "none"
    found: dict[str, Any] = {"logprobs": -F.cross_entropy(flat, expected, ignore_index=IGNORED, reduction=reduction)}
    if names:
        log_z, counts = flat.logsumexp(dim=-1), expected != IGNORED
        formulas: dict[str, Callable[[], Tensor]] = {
            "log_z": lambda: log_z,
            "entropy": lambda: log_z - ((flat - log_z[:, None]).exp() * flat).sum(dim=-1),
            "mean_logprob": lambda: flat.mean(dim=-1) - log_z,
        }
        found |= {name: torch.where(counts, formulas[name](), 0.0) for name in names}
    if summed:
        return {name: score.sum() for name, score in found.items()}
    return {name: score.view_as(targets) for name, score in found.items()}


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the compiler makes of a function."""
    return torch.compile(function)


def _sum_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of log-probabilities of targets `(tokens,)`, and its gradient by the logits `(tokens, vocab)`."""
    flat, counts = logits.float(), targets != IGNORED
    log_z, ids = flat.logsumexp(dim=-1, keepdim=True), torch.where(counts, targets, 0)[:, None]
    total = torch.where(counts, (flat.gather(1, ids) - log_z)[:, 0], 0.0).sum()
    is_target = torch.arange(flat.shape[1], device=flat.device) == ids
    return total, ((is_target.float() - (flat - log_z).exp()) * counts[:, None]).to(logits.dtype)


def _sum_and_gradients(
    to_logits: ToLogits, rows: Tensor, targets: Tensor, trained: Sequence[Tensor], compiled: bool
) -> tuple[Tensor, list[Tensor]]:
    """The sum of log-probabilities of targets, and its gradients by rows of features, if they require it, and head."""
    inputs = [rows, *trained] if rows.requires_grad else trained
    if not compiled:
        with torch.enable_grad():
            total = _scores(to_logits(rows), targets, (), summed=True)["logprobs"]
        return total.detach(), list(torch.autograd.grad(total, inputs))
    with torch.enable_grad():
        logits = to_logits(rows)
    total, gradient = fused(_sum_and_gradient)(logits.detach(), targets)
    return total, list(torch.autograd.grad(logits, inputs, gradient))


def _chunks(features: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, max(len(features), 1), chunk):  # one without tokens, if there are none
        yield features[start : start + chunk], targets[start : start + chunk]


class _ChunkedSum(torch.autograd.Function):
    """The sum of log-probabilities; its forward pass also computes the gradients of features and head."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk: int,
        compiled: bool,
        to_logits: ToLogits,
        targets: Tensor,
        features: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        for_features, *for_parameters = ctx.needs_input_grad[4:]
        trained = [parameter for parameter, needed in zip(parameters, for_parameters, strict=True) if needed]
        gradients = [torch.zeros_like(parameter) for parameter in trained]
        feature_gradients, sums = [], []
        for rows, expected in _chunks(features, targets, chunk):
            rows = rows.detach().requires_grad_(for_features)
            total, found = _sum_and_gradients(to_logits, rows, expected, trained, compiled)
            feature_gradients += [found.pop(0)] if for_features else []
            for gradient, part in zip(gradients, found, strict=True):
                gradient += part
            sums.append(total)
        ctx.feature_gradient = torch.cat(feature_gradients) if for_features else None
        remaining = iter(gradients)
        ctx.parameter_gradients = [next(remaining) if needed else None for needed in for_parameters]
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients = [ctx.feature_gradient, *ctx.parameter_gradients]
        scaled = [None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients]
        return (None, None, None, None, *scaled)
