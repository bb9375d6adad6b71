"""Where batches come from: a dataset on disk, a policy, replayed episodes; training asks for nothing else."""

from typing import Any, Protocol

from cleangpt.data.batch import Batch


class BatchSource(Protocol):
    """An endless row of batches; its position is the number of samples consumed, over all devices."""

    @property
    def wait_time(self) -> float:
        """Seconds that `next` has waited for a batch, since the start."""

    def next(self) -> Batch:
        """This rank's part of the next batch, on the host."""

    def metrics(self) -> dict[str, float]:
        """How far it has come: share of the dataset visited, reward, length of episodes."""

    def skip(self, start: int, end: int) -> None:
        """Never gives again what it gave between two positions; called before a roll-back, and outlives it."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; what was to be skipped stays skipped."""

    def close(self) -> None:
        """Stops what loads ahead."""
