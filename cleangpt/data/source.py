"""The interface for sources of training batches: a dataset on disk, a policy, replayed episodes."""

from typing import Any, Protocol

from cleangpt.data.batch import Batch


class BatchSource(Protocol):
    """An endless stream of batches; its position is the number of samples consumed, over all devices."""

    @property
    def wait_time(self) -> float:
        """Seconds that `next` has waited for a batch, since the start."""

    def next(self) -> Batch:
        """This rank's part of the next batch, on the host."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the batches so far: the share of the dataset visited, mean reward, episode length."""

    def skip(self, start: int, end: int) -> None:
        """Skips the samples between two positions from now on; called before a rollback, which does not undo it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; ranges skipped already stay skipped."""

    def close(self) -> None:
        """Stops prefetching."""
