"""The metrics of an objective over validation batches, and metrics derived from a loss."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.data.dataset import Split
from cleangpt.distributed.device import zero_sum
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Objective
from cleangpt.objectives.step_means import with_step_means
from cleangpt.tracking.metrics import metric_key


@torch.no_grad()
def validate(
    model: LanguageModel,
    objective: Objective,
    batches: Iterable[Batch],
    device: torch.device,
    context: AbstractContextManager[Any],
    stop: Callable[[], bool] = lambda: False,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, float]:
    """The mean `loss` and the objective's other metrics, per whatever the objective counts, with dropout off.

    Args:
        model: on `device`; left in the mode it was in.
        objective: computed for each batch.
        batches: on the host.
        device: of the model.
        context: makes a context, such as autocast, for the forward passes.
        stop: called before each batch; if it returns True, validation ends and every metric is NaN.
        reduce: sums a tensor over devices, each of which has its own batches.
    """
    was_training = model.training
    model.eval()
    sums = {"loss": zero_sum(device)}
    dtype = sums["loss"].dtype
    count: float = 0
    if objective.step_means:
        batches = _with_means(model, objective, list(batches), device, context, reduce)
    for batch in batches:
        if stop():
            count = math.nan
            break
        # From memory that is not pinned, the host would wait for the device before each copy.
        on_device = (batch.pin() if device.type == "cuda" else batch).to(device)
        with context:
            loss = objective(model, on_device)
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            sums[name] = sums.get(name, 0) + value.to(dtype)
        count += objective.count(batch)
    model.train(was_training)
    *totals, counted = reduce(torch.stack([*sums.values(), torch.tensor(count, dtype=dtype, device=device)])).tolist()
    return {name: total / counted if counted else math.nan for name, total in zip(sums, totals, strict=True)}


def _with_means(
    model: LanguageModel, objective: Objective, batches: list[Batch], device: torch.device,
    context: AbstractContextManager[Any], reduce: Callable[[Tensor], Tensor],
) -> list[Batch]:  # fmt: skip
    """The batches with the objective's means, over all of them."""

    def sum_over_devices(number: float) -> float:
        return reduce(torch.full_like(zero_sum(device), number)).item()

    count = sum_over_devices(sum(map(objective.count, batches)))
    with context:
        parts = (batch.to(device) for batch in batches)
        return with_step_means(objective, model, batches, parts, count, sum_over_devices)


def loss_metrics(loss: float, split: Split | None) -> dict[str, float | None]:
    """Perplexity and, where every token is a target and the text's size in bytes is known, bits per byte.

    Args:
        loss: in nats per token.
        split: over which the loss was measured; None: several, as in a mixture.
    """
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = None
    if split is not None and split.text_bytes and not split.masked:
        bits = loss / math.log(2) * split.tokens / split.text_bytes
    return {"perplexity": perplexity, "bits_per_byte": bits}


def source_metrics(name: str, losses: Mapping[str, float], splits: Mapping[str, Split]) -> dict[str, float | None]:
    """The loss, as `name`, and bits per byte of each source of a mixture; for a single corpus, nothing."""
    metrics: dict[str, float | None] = {}
    for source, loss in losses.items():
        if source:
            bits = loss_metrics(loss, splits[source])["bits_per_byte"]
            metrics |= {metric_key(name, source): loss, metric_key("bits_per_byte", source): bits}
    return metrics
