"""Where batches come from: a dataset on disk, a policy, replayed episodes; training asks for nothing else."""

from typing import Any, Protocol

from cleangpt.data.batch import Batch


class BatchSource(Protocol):
    """An endless stream of batches; its position is the number of samples consumed, over all devices."""

    wait_time: float
    """Seconds that `next` has waited for a batch, since the start."""

    def next(self) -> Batch:
        """This rank's part of the next batch, on the host."""

    def metrics(self) -> dict[str, float]:
        """Metrics of what it has given so far: the share of the dataset visited, reward, length of episodes."""

    def skip(self, start: int, end: int) -> None:
        """Skips from now on what it gave between two positions; called before a roll-back, which does not undo it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; what is skipped already stays skipped."""

    def close(self) -> None:
        """Stops loading ahead."""
