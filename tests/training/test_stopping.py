"""Why a run stops: what one process is asked or finds out, all do after the same step."""

import math

import pytest

from cleangpt.config import EarlyStoppingConfig
from cleangpt.distributed.processes import Ranks
from cleangpt.training.deadline import Deadline
from cleangpt.training.early_stopping import EarlyStopping
from cleangpt.training.state import Length, Position
from cleangpt.training.stopping import Stopping


class Together(Ranks):
    """One of two processes; the other has been asked for what `other` says: stop, time is up, save, fail."""

    other = (0.0, 0.0, 0.0, 0.0)

    def sum(self, *numbers: float) -> list[float]:
        return [mine + theirs for mine, theirs in zip(numbers, self.other, strict=True)]


def stopping(other: tuple[float, ...] = (0, 0, 0, 0), end: float | None = None) -> tuple[Stopping, list[str]]:
    class WithOther(Together):
        pass

    WithOther.other = other
    lines: list[str] = []
    early = EarlyStopping(EarlyStoppingConfig(patience=2))
    return Stopping(early, Deadline(end, 1.0), WithOther(world_size=2), Length(8, 4, 6), lines.append), lines


def test_nothing_asked_is_no_reason_to_stop() -> None:
    stop, lines = stopping()
    assert not stop.poll(0.0)
    assert (stop.reason, stop.save_requested, stop.failing, lines) == (None, False, False, [])
    assert stop.status(Position(macro_batch=5)) == ""


@pytest.mark.parametrize(
    ("other", "reason"), [((1, 0, 0, 0), "signal"), ((0, 1, 0, 0), "time limit"), ((1, 1, 0, 0), "signal")]
)
def test_what_another_process_is_asked_stops_this_one(other: tuple[float, ...], reason: str) -> None:
    stop, _ = stopping(other)
    assert stop.poll(0.0)
    assert (stop.requested, stop.reason) == (True, reason)
    assert stop.status(Position()) == stop.status(Position(macro_batch=6)) == "interrupted"


def test_a_signal_of_its_own_stops_and_the_first_reason_stays() -> None:
    stop, _ = stopping()
    stop.signals.requested = "SIGTERM"
    assert stop.poll(0.0) and stop.reason == "signal"
    stop.deadline.end = 0.0
    assert stop.poll(0.0) and stop.reason == "signal"


def test_the_end_of_the_time_is_logged_once() -> None:
    stop, lines = stopping(end=0.0)
    assert stop.poll(0.0) and stop.poll(0.0)
    assert lines == ["0 s before the time limit: saving"] and stop.reason == "time limit"


def test_a_request_to_save_reaches_all_and_is_done_with_when_saved() -> None:
    stop, _ = stopping(other=(0, 0, 1, 0))
    assert not stop.poll(0.0) and stop.save_requested
    own, _ = stopping()
    own.signals.save_requested = True
    assert not own.poll(0.0) and own.save_requested
    own.saved()
    assert not own.save_requested and not own.poll(0.0) and not own.save_requested


def test_a_run_that_stops_saves_at_its_end_alone() -> None:
    stop, _ = stopping(other=(1, 0, 1, 0))
    assert stop.poll(0.0) and not stop.save_requested


def test_a_process_that_must_fail_is_heard_at_one_poll() -> None:
    assert stopping(other=(0, 0, 0, 1))[0].poll(0.0) is False
    stop, _ = stopping()
    stop.must_fail = True
    assert not stop.poll(0.0) and stop.failing
    assert not stop.poll(0.0) and not stop.failing


def test_the_last_macro_batch_and_patience_end_a_run() -> None:
    stop, _ = stopping()
    assert stop.status(Position(macro_batch=6)) == "finished"
    for loss in (1.0, 2.0, math.nan):
        assert stop.status(Position(macro_batch=3)) == ""
        stop.early.update(loss)
    assert stop.status(Position(macro_batch=3)) == "stopped early"
