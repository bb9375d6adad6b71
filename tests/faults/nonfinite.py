"""NaN and infinity in losses, gradients and weights, and losses that jump, with the run killed around them."""

import functools
import math
import signal
from pathlib import Path
from typing import Any

from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.data import loader as batches
from cleangpt.objectives import Loss, Objective
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.trainer import Trainer
from tests.faults import _disk, fault
from tests.faults._disk import operations
from tests.faults._runs import (
    EXPERIMENT,
    TRAIN,
    check_whole,
    differing,
    newest_state,
    output,
    run,
    run_two,
    unbroken,
    victim,
)
from tests.faults.kill import check_codes, impatient
from tests.losses import scaled

VALUES = (math.nan, math.inf, -math.inf)


def steps() -> int:
    """How many the unbroken run has made."""
    return int(newest_state(unbroken() / "run")["position"]["step"])


class Spoilt:
    """An objective whose loss is multiplied by a value."""

    def __init__(self, objective: Objective, value: float) -> None:
        self.objective, self.value, self.count = objective, value, objective.count

    def __call__(self, *given: Any) -> Loss:
        loss = self.objective(*given)
        return loss._replace(total=loss.total * self.value)


def spoil(what: str, step: int, value: float, dies_at: int | None = None) -> None:
    """Puts a value into the loss, a gradient or a weight of a step; perhaps kills the process at an operation."""
    if dies_at is not None:
        _disk.install("kill", dies_at)
    plain, update = Trainer.step, Optimizer.step

    def spoilt_update(self: Optimizer, *given: Any) -> Any:
        gradient = self.parameters[0].grad
        assert gradient is not None
        gradient.view(-1)[0] = value
        return update(self, *given)

    def spoilt(self: Trainer) -> None:
        here, objective = self.position.step == step, self.objective
        if here and what == "loss":
            self.objective = scaled(objective, lambda: value)
        Optimizer.step = spoilt_update if here and what == "gradient" else update  # type: ignore[method-assign]
        plain(self)
        self.objective = objective
        if here and what == "weight":
            next(self.model.parameters()).data.view(-1)[0] = value

    Trainer.step = spoilt  # type: ignore[method-assign]


@fault("NaN or infinity in the loss or a gradient, and a kill", short=2, long=40)
def skipped(seed: int, folder: Path) -> None:
    """The step is skipped, and the killed run ends like one that met the same and was not killed."""
    what, value, step = ("loss", "gradient")[seed % 2], VALUES[seed % 3], seed % steps()
    reference, broken = folder / "reference", folder / "broken"
    for place in (reference, broken):
        place.mkdir()
        victim(place)
    assert run(reference, *TRAIN, hook=functools.partial(spoil, what, step, value)) == 0, output(reference)
    assert read_metrics(reference / "run")[-1]["skipped_steps"] == 1
    dying = functools.partial(spoil, what, step, value, seed * 31 % operations("kill"))
    assert run(broken, *TRAIN, hook=dying) in (0, -signal.SIGKILL), output(broken)
    assert run(broken, *TRAIN, hook=functools.partial(spoil, what, step, value)) == 0, output(broken)
    check_whole(broken, reference)


@fault("a weight that is NaN or infinite", short=2, long=30)
def poisoned(seed: int, folder: Path) -> None:
    """The run ends and saves nothing of it; what was good is gone on from."""
    victim(folder)
    code = run(folder, *TRAIN, hook=functools.partial(spoil, "weight", seed % steps(), VALUES[seed % 3]))
    said = output(folder)
    assert code == 1 and "is not finite after step" in said and "Traceback" not in said, f"{code}: {said}"
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


@fault("a weight of one of two processes that is NaN", short=1, long=4, slow=True)
def poisoned_part(seed: int, folder: Path) -> None:
    victim(folder)
    hooks: list[Any] = [None, None]
    hooks[seed % 2] = functools.partial(spoil, "weight", (3 + seed) % steps(), math.nan)
    codes = run_two(folder, *TRAIN, hooks=hooks)
    assert codes == [1, 1] and "is not finite after step" in output(folder), f"{codes}: {output(folder)}"
    assert run_two(folder, *TRAIN) == [0, 0], output(folder)
    check_whole(folder, unbroken(processes=2))


# Spikes --------------------------------------------------------------------------------------------------------------

WATCHED = EXPERIMENT.replace(
    "(macro_batches=3,", "(macro_batches=6, spike_threshold=0.15, spike_window=4, spike_skip=2,"
).replace("SavingConfig(", "SavingConfig(keep_snapshots=3, ")
BAD = range(64, 72)
"""Samples of the data whose targets are wrong."""
assert "macro_batches=6" in WATCHED and "keep_snapshots" in WATCHED


def bad_data(dies_at: int | None = None) -> None:
    if dies_at is not None:
        _disk.install("kill", dies_at)
    plain = batches.SplitStream.batch

    def batch(self: batches.SplitStream, start: int, count: int) -> batches.Batch:
        read = plain(self, start, count)
        for row in range(count):
            if start + row in BAD:
                read.targets[row].fill_(12)
        return read

    batches.SplitStream.batch = batch  # type: ignore[method-assign]


@functools.cache
def spiked(strategy: str = "") -> Path:
    """A run that has met the bad data, gone back and left it out; with a strategy, one of two processes."""
    folder = unbroken(WATCHED).parent / f"{unbroken(WATCHED).name}_spiked{strategy}"
    folder.mkdir()
    victim(folder, WATCHED)
    if strategy:
        assert run_two(folder, *TRAIN, *by(strategy), hooks=[bad_data, bad_data]) == [0, 0], output(folder)
    else:
        assert run(folder, *TRAIN, hook=bad_data) == 0, output(folder)
    assert newest_state(folder / "run")["source"]["skipped_ranges"], output(folder)
    return folder


def by(strategy: str) -> tuple[str, str]:
    return "--parallel.strategy", strategy


def check_went_back(folder: Path, reference: Path) -> None:
    one, two = (newest_state(place / "run") for place in (folder, reference))
    assert (difference := differing(one, two)) == "", difference
    assert [row["macro_batch"] for row in read_metrics(folder / "run")] == [1, 2, 3, 4, 5, 6]
    assert list_snapshots(folder / "run" / "snapshots")[0].name == "mb000006"


@fault("a spike of the loss, and a kill at an operation on the disk", short=2, long=60, slow=True)
def spike(seed: int, folder: Path) -> None:
    reference = spiked()
    victim(folder, WATCHED)
    at = seed * 7919 % (2 * operations("kill"))
    assert run(folder, *TRAIN, hook=functools.partial(bad_data, at)) in (0, -signal.SIGKILL), output(folder)
    assert run(folder, *TRAIN, hook=bad_data) == 0, output(folder)
    check_went_back(folder, reference)


@fault("a spike of the loss in two processes, of which one is killed", short=1, long=45, slow=True)
def spike_of_two(seed: int, folder: Path) -> None:
    """The weights whole on each (ddp), in shards (fsdp), and cut with the sequence (tp)."""
    strategy, rank = ("fsdp", "tp", "ddp")[seed % 3], seed // 3 % 2
    reference = spiked(strategy)
    victim(folder, WATCHED)
    hooks: list[Any] = [impatient_with_bad_data] * 2
    hooks[rank] = functools.partial(impatient_with_bad_data, seed * 7919 % (2 * operations("kill")))
    check_codes(folder, run_two(folder, *TRAIN, *by(strategy), hooks=hooks))
    assert run_two(folder, *TRAIN, *by(strategy), hooks=[bad_data, bad_data]) == [0, 0], output(folder)
    check_went_back(folder, reference)


def impatient_with_bad_data(dies_at: int | None = None) -> None:
    impatient()
    bad_data(dies_at)
