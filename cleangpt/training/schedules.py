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
    count = accumulation(experiment, samples)
    return StepPlan(count, learning_rate(experiment, samples, count), weight_decay(experiment, samples, count))


def planned_steps(experiment: Experiment) -> int:
    """Estimated number of steps of the run; exact if every step has the same number of batches."""
    return math.ceil(total_samples(experiment) / (experiment.data.batch_size * experiment.training.accumulation))


def learning_rate(experiment: Experiment, samples: int, accumulation: int) -> float:
    """The learning rate of the step that starts after `samples` samples and has `accumulation` batches."""
    total = total_samples(experiment)
    step_share = accumulation * experiment.data.batch_size / total
    return experiment.optimizer.lr * factor(experiment.schedule.lr, samples / total, step_share)


def weight_decay(experiment: Experiment, samples: int, accumulation: int) -> float:
    """The weight decay of the same step."""
    total = total_samples(experiment)
    step_share = accumulation * experiment.data.batch_size / total
    return experiment.optimizer.weight_decay * factor(experiment.schedule.weight_decay, samples / total, step_share)


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


def curves(experiment: Experiment) -> tuple[list[int], dict[str, list[float]]]:
    """Every step of the planned run: the samples before it, its learning rate, weight decay and training batch size."""
    samples, seen = 0, []
    planned: dict[str, list[float]] = {"lr": [], "weight_decay": [], "training_batch_size": []}
    while samples < total_samples(experiment):
        batches = accumulation(experiment, samples)
        seen.append(samples)
        planned["lr"].append(learning_rate(experiment, samples, batches))
        planned["weight_decay"].append(weight_decay(experiment, samples, batches))
        planned["training_batch_size"].append(batches * experiment.data.batch_size)
        samples += batches * experiment.data.batch_size
    return seen, planned
