"""When and why a run stops: a signal, a time limit, early stopping, or its end."""

from collections.abc import Callable

from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.signals import StopRequest
from cleangpt.training.deadline import Deadline
from cleangpt.training.early_stopping import EarlyStopping
from cleangpt.training.state import Length, Position


class Stopping:
    """Decides whether to stop, save or fail, the same on every process."""

    def __init__(
        self, early: EarlyStopping, deadline: Deadline, ranks: Ranks, length: Length, log: Callable[[str], None]
    ) -> None:
        self.early, self.deadline, self.ranks, self.length, self.log = early, deadline, ranks, length, log
        self.signals = StopRequest()
        self.requested = False
        """Whether the run stops before its end, agreed on by all processes."""
        self.reason: str | None = None
        """Why the run stops."""
        self.save_requested = self.failing = False
        """Whether any process was asked to save, or must fail, at the last poll."""
        self.must_fail = False
        """Whether this process has found a reason to fail."""

    def poll(self, longest_save: float) -> bool:
        """Whether any process has been asked to stop or is out of time; called between any two pieces of work.

        Args:
            longest_save: longest duration of a save so far in seconds; 0: unknown.
        """
        asked, late, save, failing = self.ranks.sum(
            self.signals.requested is not None, self.deadline.near(longest_save), self.signals.save_requested,
            self.must_fail,
        )  # fmt: skip
        self.failing, self.must_fail = failing > 0, False
        if late and not self.requested:
            self.log(f"{max(self.deadline.left, 0):.0f} s before the time limit: saving")
        self.requested = asked + late > 0
        if self.requested:
            self.reason = self.reason or ("signal" if asked else "time limit")
        self.save_requested = save > 0 and not self.requested
        return self.requested

    def saved(self) -> None:
        """Clears the request to save."""
        self.signals.save_requested = self.save_requested = False

    def status(self, position: Position) -> str:
        """Why the run is over; empty while it is not."""
        if self.requested:
            return "interrupted"
        if position.macro_batch >= self.length.macro_batches:
            return "finished"
        return "stopped early" if self.early.should_stop else ""
