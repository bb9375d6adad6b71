"""Early stopping: ends a run after a number of macro-batches without a better validation loss."""

import math
from typing import Any

from cleangpt.config import EarlyStoppingConfig


class EarlyStopping:
    """Counts macro-batches since the validation loss last fell by more than `min_delta`; a NaN is no improvement.

    With `highest`, another metric that is to rise.
    """

    def __init__(self, config: EarlyStoppingConfig, highest: bool = False) -> None:
        self.config, self.highest = config, highest
        self.best = math.inf
        self.waited = 0

    def update(self, val_loss: float) -> None:
        """Records the validation loss of a macro-batch in nats, or the other metric."""
        val_loss = -val_loss if self.highest else val_loss
        if val_loss < self.best - self.config.min_delta:
            self.best, self.waited = val_loss, 0
        else:
            self.waited += 1

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out, or the target is reached."""
        target = None if self.config.target is None else -self.config.target if self.highest else self.config.target
        reached = target is not None and self.best <= target
        return reached or (self.config.patience is not None and self.waited >= self.config.patience)

    def state_dict(self) -> dict[str, Any]:
        """The state for a snapshot."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.best, self.waited = state["best"], state["waited"]
