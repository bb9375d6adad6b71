"""Numbers gone wrong: a loss that jumps, and weights that are not finite."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cleangpt.config import TrainingConfig
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import local_tensor


class Spikes:
    """Finds the step at which the loss jumped, or at which too many in a row were skipped; see docs/reliability.md.

    The losses stay on the device until `judge` reads them, before anything is made of the weights. Which step is found
    depends on the losses alone, not on when they are read, so a resumed run finds the same.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.enabled = config.spike_threshold is not None
        self.recent: deque[float] = deque(maxlen=config.spike_window)
        """Losses of the last steps, in nats; of skipped steps there are none."""
        self.skipped = 0
        """Steps skipped in a row until now."""
        self.rollbacks = 0
        self.found: int | None = None
        """The position after the step that was found, in samples; None: there is none."""
        self._unread: list[tuple[int, Tensor]] = []

    def note(self, end: int, loss: Tensor, skipped: Tensor) -> None:
        """Takes this process's part of the loss of the step that ended at a position, and whether it was skipped."""
        self._unread.append((end, torch.where(skipped > 0, math.nan, loss)))

    def judge(self, ranks: Ranks) -> int | None:
        """Reads the losses noted since the last time, on all processes together; returns `found`."""
        if not self._unread:
            return self.found
        ends, parts = zip(*self._unread, strict=True)
        self._unread.clear()
        for end, loss in zip(ends, ranks.sum(*torch.stack(parts).tolist()), strict=True):
            if self.found is None and self._is_spike(loss):
                self.found = end
        return self.found

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            self.skipped += 1
            return self.skipped >= self.config.max_skipped_steps
        self.skipped = 0
        full, allowed = len(self.recent) == self.config.spike_window, self.config.spike_threshold or 0.0
        if full and loss > math.fsum(self.recent) / len(self.recent) + allowed:
            return True
        self.recent.append(loss)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, once all losses are read."""
        return {"recent": list(self.recent), "skipped": self.skipped, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.recent = deque(state["recent"], self.config.spike_window)
        self.skipped, self.rollbacks = state["skipped"], state["rollbacks"]
        self.found = None
        self._unread.clear()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor of whose part here a number is NaN or infinite; empty: all are finite.

    The device is waited for once, unless there is one.
    """
    parts = {name: local_tensor(tensor).detach() for name, tensor in tensors.items()}
    parts = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    if not parts or torch.nn.utils.get_total_norm(parts.values(), math.inf).isfinite():
        return ""
    return next(name for name, part in parts.items() if not part.isfinite().all())
