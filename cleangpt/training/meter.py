"""What a step and a macro-batch have added up: losses, gradient norms and the objective's metrics."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cleangpt.distributed.processes import Ranks
from cleangpt.objectives import Loss
from cleangpt.training.state import set_numbers


class LossSums:
    """Sums of the losses of a step's micro-batches, on the device."""

    def __init__(self, device: torch.device, copies: int) -> None:
        """`copies` is how many processes compute the same loss, as under tensor parallelism."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.metrics: dict[str, Tensor] = {}
        self.copies = copies

    def add(self, loss: Loss) -> None:
        """Adds a micro-batch. A loss that is not finite skips the step; kept out of the sum, it hides no other step."""
        self.total += loss.total.detach().nan_to_num(0.0, 0.0, 0.0) / self.copies
        for name, value in loss.metrics.items():
            share = value.detach().to(self.total.dtype).nan_to_num(0.0, 0.0, 0.0) / self.copies
            self.metrics[name] = self.metrics[name] + share if name in self.metrics else share


@dataclass(frozen=True)
class StepResult:
    """What came of one optimizer step."""

    loss: Tensor
    """Of this process's rows, summed over what the objective counts; 0-dim, on the device."""
    metrics: dict[str, Tensor]
    """Of the objective, likewise."""
    count: float
    """What the objective counted, over all processes."""
    grad_norm: Tensor
    """Before clipping; 0-dim, on the device."""
    skipped: Tensor
    """More than 0 where the gradient was not finite; 0-dim, on the device."""
    samples: int
    lr: float
    weight_decay: float


class Meter:
    """Sums over the macro-batch in progress; losses stay on the device until they are read."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self._device, self._ranks = device, ranks
        self.reset()

    def reset(self) -> None:
        """Starts a macro-batch."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=dtype, device=self._device)
        """Summed over this process's rows."""
        self.grad_norm = torch.zeros_like(self.loss)
        """Summed over steps."""
        self.metrics: dict[str, Tensor] = {}
        self.count = 0.0
        """Over all processes."""
        self.steps = self.samples = 0
        self.seconds = self.waited = 0.0
        """Of training, and of it waiting for batches."""
        self.lr = self.weight_decay = 0.0
        """Of the last step."""

    def add(self, step: StepResult) -> None:
        """Adds a step."""
        self.loss += step.loss
        self.grad_norm += step.grad_norm
        for name, value in step.metrics.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value
        self.count += step.count
        self.steps += 1
        self.samples += step.samples
        self.lr, self.weight_decay = step.lr, step.weight_decay

    def mean_loss(self) -> float:
        """Per counted thing, over all processes."""
        return self._ranks.sum(self.loss.item() / max(self.count, 1))[0]

    def mean_metrics(self) -> dict[str, float]:
        """The objective's metrics, likewise."""
        names = sorted(self.metrics)
        sums = self._ranks.sum(*(self.metrics[name].item() / max(self.count, 1) for name in names))
        return dict(zip(names, sums, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a run resumed within a macro-batch needs: every process's own sums, for they are added in its order."""
        sums = {"loss": self.loss.item(), **{name: value.item() for name, value in self.metrics.items()}}
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        return numbers | {"grad_norm": self.grad_norm.item(), "sums": self._ranks.all_gather(sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; with another number of processes, the main one takes the sums of all.

        Raises:
            ValueError: an entry is no number that it may be.
        """
        self.reset()
        sums: list[dict[str, float]] = state["sums"]
        set_numbers(self, {name: value for name, value in state.items() if name not in ("sums", "grad_norm")})
        self.grad_norm += state["grad_norm"]
        if len(sums) == self._ranks.world_size:
            own = sums[self._ranks.rank]
        else:
            own = {name: math.fsum(each[name] for each in sums) * self._ranks.is_main for name in sums[0]}
        self.loss += own.pop("loss")
        self.metrics = {name: torch.full_like(self.loss, value) for name, value in own.items()}
