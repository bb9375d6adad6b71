"""Schedules are functions of progress (design rule 4): nothing about them is ever saved.

Progress is samples seen divided by samples in the whole run, so that all schedules stay in step when the training batch
size grows.
"""

import math
from dataclasses import dataclass

from cleangpt.config import Schedule
from cleangpt.experiment import Experiment, samples_per_macro_batch, total_samples


def factor(schedule: Schedule, progress: float, step_share: float = 0.0) -> float:
    """The schedule's factor at a progress from 0 to 1.

    In the warm-up the factor rises linearly and reaches `initial` at its end; it includes the step about to be taken
    (`step_share` of the run), so that the first step does not have a rate of zero. After it, with t from 0 to 1:
    linear, cosine (Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts) and power, (1 - t)**power, go from
    `initial` to `final`; wsd (Hu et al. 2024, "MiniCPM", section 4) stays at `initial` and falls linearly in the last
    `decay` share of the run.
    """
    initial, final = schedule.initial, schedule.final
    if progress < schedule.warmup:
        return initial * min(1.0, (progress + step_share) / schedule.warmup)
    t = min(1.0, (progress - schedule.warmup) / (1 - schedule.warmup)) if schedule.warmup < 1 else 1.0
    if schedule.shape == "constant":
        return initial
    if schedule.shape == "linear":
        remaining = 1 - t
    elif schedule.shape == "cosine":
        remaining = (1 + math.cos(math.pi * t)) / 2
    elif schedule.shape == "power":
        remaining = (1 - t) ** schedule.power
    else:
        remaining = min(1.0, (1 - min(progress, 1.0)) / schedule.decay) if schedule.decay else 1.0
    return final + (initial - final) * remaining


@dataclass(frozen=True)
class StepPlan:
    """The scheduled values of a step."""

    accumulation: int
    """Batches in the step."""
    lr: float
    weight_decay: float


def step_plan(experiment: Experiment, samples: int) -> StepPlan:
    """The step that starts after `samples` samples."""
    batches, total = accumulation(experiment, samples), total_samples(experiment)
    progress, step_share = samples / total, batches * experiment.data.batch_size / total
    lr, weight_decay = (
        peak * factor(schedule, progress, step_share)
        for peak, schedule in (
            (experiment.optimizer.lr, experiment.schedule.lr),
            (experiment.optimizer.weight_decay, experiment.schedule.weight_decay),
        )
    )
    return StepPlan(batches, lr, weight_decay)


def accumulation(experiment: Experiment, samples: int) -> int:
    """Batches in the step that starts after `samples` samples.

    At most the scheduled number, and never past the end of the macro-batch: the rest of a macro-batch is divided evenly
    among as few steps as possible, so that no step is much smaller than its neighbours.
    """
    scheduled = experiment.training.accumulation * factor(
        experiment.schedule.batch_size, samples / total_samples(experiment)
    )
    most = max(1, round(scheduled))
    per_macro_batch = samples_per_macro_batch(experiment)
    left = (per_macro_batch - samples % per_macro_batch) // experiment.data.batch_size
    return math.ceil(left / math.ceil(left / most))
