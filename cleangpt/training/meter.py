"""Sums over a step and a macro-batch: losses, gradient norms and the objective's metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cleangpt.distributed.device import zero_sum
from cleangpt.distributed.processes import Ranks
from cleangpt.objectives import Loss
from cleangpt.training.state import set_numbers

SHARED = ("grad_norm", "count", "updates")
"""The sums of a `Meter` on the device that are the same on every process."""
MAXIMUM = "_max"
"""How the name of a metric ends that is a maximum instead of a sum."""


class LossSums:
    """Sums of the losses of a step's micro-batches, on the device."""

    def __init__(self, device: torch.device, copies: int) -> None:
        """`copies` is the number of processes that compute the same loss, as under tensor parallelism."""
        self.total = zero_sum(device)
        self.metrics: dict[str, Tensor] = {}
        self.copies = copies

    def add(self, loss: Loss) -> None:
        """Adds a micro-batch."""
        self.total += loss.total.detach() / self.copies
        for name, value in loss.metrics.items():
            value = value.detach().to(self.total.dtype)
            _add(self.metrics, name, value if name.endswith(MAXIMUM) else value / self.copies)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    combine = torch.maximum if name.endswith(MAXIMUM) else torch.add
    sums[name] = combine(sums[name], value) if name in sums else value


def mean(total: float, count: float) -> float:
    """`total` / `count`; NaN if nothing was counted."""
    return total / count if count else math.nan


def combine(name: str, parts: Sequence[float], count: float) -> float:
    """A metric over all processes from that of each: the mean per counted thing, or the maximum."""
    return max(parts) if name.endswith(MAXIMUM) else mean(math.fsum(parts), count)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step."""

    loss: Tensor
    """Loss of this process's rows, summed over what the objective counts; 0-dim, on the device."""
    metrics: dict[str, Tensor]
    """Metrics of the objective, likewise summed; those whose names end in _max are maxima."""
    count: float
    """The objective's count, over all processes."""
    grad_norm: Tensor
    """Gradient norm before clipping, not finite for a skipped step; 0-dim, on the device."""
    skipped: Tensor
    """More than 0 if the gradient was not finite; 0-dim, on the device."""
    samples: int
    lr: float
    weight_decay: float


class Meter:
    """Sums over the macro-batch in progress, without skipped steps; they stay on the device until they are read."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self._device, self._ranks = device, ranks
        self.reset()

    def reset(self) -> None:
        """Starts a macro-batch."""
        self.loss = zero_sum(self._device)
        """Loss summed over this process's rows."""
        self.grad_norm = torch.zeros_like(self.loss)
        """Gradient norm summed over steps."""
        self.metrics: dict[str, Tensor] = {}
        self.count, self.updates = zero_sum(self._device), zero_sum(self._device)
        """The objective's count, over all processes, and the number of steps in these sums."""
        self.steps = self.samples = 0
        """All steps and their samples, skipped ones included."""
        self.seconds = self.waited = 0.0
        """Time spent training, and the part of it spent waiting for batches."""
        self.lr = self.weight_decay = 0.0
        """Learning rate and weight decay of the last step."""

    def add(self, step: StepResult) -> None:
        """Adds a step."""
        made = step.skipped == 0
        self.loss += torch.where(made, step.loss, 0.0)
        self.grad_norm += torch.where(made, step.grad_norm, 0.0)
        for name, value in step.metrics.items():
            _add(self.metrics, name, torch.where(made, value, 0.0))
        self.count += made * torch.full_like(self.count, step.count)
        self.updates += made
        self.steps += 1
        self.samples += step.samples
        self.lr, self.weight_decay = step.lr, step.weight_decay

    def mean_loss(self) -> float:
        """The mean loss per counted thing, over all processes; NaN if every step was skipped."""
        return self._ranks.sum(mean(self.loss.item(), self.count.item()))[0]

    def mean_metrics(self) -> dict[str, float]:
        """The means of the objective's metrics, likewise."""
        names = sorted(self.metrics)
        parts = self._ranks.all_gather([self.metrics[name].item() for name in names])
        count = self.count.item()
        return {name: combine(name, values, count) for name, *values in zip(names, *parts, strict=True)}

    def mean_grad_norm(self) -> float:
        """The mean gradient norm; NaN if every step was skipped."""
        return mean(self.grad_norm.item(), self.updates.item())

    def state_dict(self) -> dict[str, Any]:
        """The state for a snapshot within a macro-batch: each process's own sums, to keep the order of additions."""
        sums = {"loss": self.loss.item(), **{name: value.item() for name, value in self.metrics.items()}}
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        shared = {name: getattr(self, name).item() for name in SHARED}
        return numbers | shared | {"sums": self._ranks.all_gather(sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; with another number of processes, the main one takes all sums.

        Raises:
            ValueError: an entry is not a number in its range.
        """
        self.reset()
        sums: list[dict[str, float]] = state["sums"]
        set_numbers(self, {name: value for name, value in state.items() if name not in ("sums", *SHARED)})
        shared = SimpleNamespace(**dict.fromkeys(SHARED, 0.0))
        set_numbers(shared, {name: state[name] for name in SHARED})
        for name in SHARED:
            getattr(self, name).fill_(getattr(shared, name))
        if len(sums) == self._ranks.world_size:
            own = sums[self._ranks.rank]
        else:
            own = {name: math.fsum(each[name] for each in sums) * self._ranks.is_main for name in sums[0]}
            own |= {name: max(each[name] for each in sums) for name in own if name.endswith(MAXIMUM)}
        self.loss += own.pop("loss")
        self.metrics = {name: torch.full_like(self.loss, value) for name, value in own.items()}
