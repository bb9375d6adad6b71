"""The mean loss of a model over validation batches, and what follows from it."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.data.dataset import Split
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Objective
from cleangpt.tracking.metrics import metric_key


@torch.no_grad()
def mean_loss(
    model: LanguageModel,
    objective: Objective,
    batches: Iterable[Batch],
    device: torch.device,
    context: AbstractContextManager[Any],
    give_up: Callable[[], bool] = lambda: False,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """The loss per target token, in nats, with dropout off; a NaN where `give_up` said yes on the way.

    `reduce` sums a tensor over devices, each of which has its own batches.
    """
    was_training = model.training
    model.eval()
    # Sums grow long: double where the device has it.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=dtype, device=device)
    for batch in batches:
        if give_up():
            sums *= math.nan
            break
        with context:
            sums[0] += objective(model, batch.to(device)).total
        sums[1] += objective.count(batch)
    model.train(was_training)
    total, targets = reduce(sums).tolist()
    return total / targets if targets else math.nan


def loss_metrics(loss: float, split: Split | None) -> dict[str, float | None]:
    """Perplexity and, where every token is a target and the bytes of text are known, bits per byte.

    The loss of a mixture is of no one split (None).
    """
    perplexity = math.exp(loss) if loss < 700 else math.inf
    known = split is not None and split.text_bytes and not split.masked
    bits = loss / math.log(2) * split.tokens / split.text_bytes if split is not None and known else None
    return {"perplexity": perplexity, "bits_per_byte": bits}


def source_metrics(name: str, losses: Mapping[str, float], splits: Mapping[str, Split]) -> dict[str, float | None]:
    """The loss, under `name`, and bits per byte of each source of a mixture; of a single corpus, nothing."""
    figures: dict[str, float | None] = {}
    for source, loss in losses.items():
        if source:
            bits = loss_metrics(loss, splits[source])["bits_per_byte"]
            figures |= {metric_key(name, source): loss, metric_key("bits_per_byte", source): bits}
    return figures
