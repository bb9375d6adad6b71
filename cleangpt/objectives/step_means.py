"""Means over a whole step that every part of its loss reads.

They must not depend on how the step is split over micro-batches and devices, so they are known before the first loss is
computed, and come with the batch like anything else that needs no gradient.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Objective


@torch.no_grad()
def with_step_means(
    objective: Objective,
    model: LanguageModel,
    batches: Sequence[Batch],
    micro_batches: Iterable[Batch],
    count: float,
    sum_over_devices: Callable[[float], float],
) -> list[Batch]:
    """The batches with the objective's `step_means` as extras `(rows,)`, float32.

    Args:
        objective: whose means they are.
        model: which `step_sums` reads.
        batches: of the step, on the host.
        micro_batches: the same rows, on the model's device.
        count: the objective's count, over all devices.
        sum_over_devices: of a number that each device has; all call it together.
    """
    if not objective.step_means:
        return list(batches)
    sums = dict.fromkeys(objective.step_means, 0.0)
    for part in micro_batches:
        for name, value in objective.step_sums(model, part).items():
            sums[name] += value.item()
    means = {name: sum_over_devices(total) / max(count, 1) for name, total in sums.items()}
    return [
        replace(batch, extras=batch.extras | {name: torch.full((len(batch),), mean) for name, mean in means.items()})
        for batch in batches
    ]
