"""Signals and time limits, wherever they fall: what is saved is gone on from to the same bits."""

import functools
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cleangpt.checkpoints import tensor_files as shards
from cleangpt.checkpoints.checkpoint import Checkpoints
from cleangpt.files import read_json
from cleangpt.tracking.metrics import MetricsFiles
from cleangpt.training import build, validator
from cleangpt.training.deadline import Deadline
from cleangpt.training.saving import Saver
from cleangpt.training.trainer import Trainer
from tests.faults import fault
from tests.faults._runs import TRAIN, check_whole, finish, output, run, run_two, start, unbroken, victim

STOPS = ("SIGTERM", "SIGINT", "SIGHUP")
SIGNALS = (*STOPS, "SIGUSR1")
PLACES: dict[str, tuple[Any, str]] = {
    "a step": (Trainer, "step"),
    "validation": (validator, "validate"),
    "saving": (shards, "save_file"),
    "a checkpoint": (Checkpoints, "offer"),
    "recording": (MetricsFiles, "record"),
    "sampling": (build, "sample_text"),
    "the end": (Saver, "save_last"),
}


def send(names: tuple[str, ...], place: str, call: int) -> None:
    """Makes the process send itself signals in the midst of the so-many-th call of a function."""
    owner, name = PLACES[place]
    plain, calls = getattr(owner, name), itertools.count()

    @functools.wraps(plain)
    def interrupted(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            for number in names:
                os.kill(os.getpid(), getattr(signal, number))
        return plain(*given, **named)

    setattr(owner, name, interrupted)


def check_polite(folder: Path, code: int, stops: bool = True) -> None:
    """Asserts that a run has saved and ended in order, and that the same command ends it like the unbroken one."""
    assert code == 0, f"exit code {code}: {output(folder)}"
    status = read_json(folder / "run" / "status.json")["status"]
    assert status == "finished" or (stops and status == "interrupted"), status
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


def of_seed(seed: int, *choices: Any) -> list[Any]:
    """One of each of the choices; every combination has a seed."""
    return list(list(itertools.product(*choices))[seed * 37 % len(list(itertools.product(*choices)))])


@fault("a signal in the midst of a step, validation, saving, ...", short=4, long=4 * 7 * 3)
def one_signal(seed: int, folder: Path) -> None:
    name, place, call = of_seed(seed, SIGNALS, list(PLACES), (0, 1, 3))
    victim(folder)
    code = run(folder, *TRAIN, hook=functools.partial(send, (name,), place, call))
    check_polite(folder, code, stops=name != "SIGUSR1")


@fault("two signals at once", short=2, long=3 * 3 * 7)
def two_signals(seed: int, folder: Path) -> None:
    """But for a second SIGINT, which stops at once, as it is asked to.

    Those that the saving thread sends may both wait for the main one, which takes SIGHUP before SIGINT.
    """
    first, second, place = of_seed(seed, SIGNALS[:3], ("SIGTERM", "SIGHUP", "SIGUSR1"), list(PLACES))
    victim(folder)
    code = run(folder, *TRAIN, hook=functools.partial(send, (first, second), place, 1))
    if code == 130 and (first, second, place) == ("SIGINT", "SIGHUP", "saving"):
        assert run(folder, *TRAIN) == 0, output(folder)
        check_whole(folder)
    else:
        check_polite(folder, code)


@fault("Ctrl-C twice", short=1, long=7)
def twice(seed: int, folder: Path) -> None:
    (place,) = of_seed(seed, list(PLACES))
    victim(folder)
    code = run(folder, *TRAIN, hook=functools.partial(send, ("SIGINT", "SIGINT"), place, 1))
    assert code in (0, 130), f"exit code {code}: {output(folder)}"
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


@fault("a signal at a random moment", short=2, long=40)
def at_random(seed: int, folder: Path) -> None:
    """Before training has begun it ends the process, which has nothing to save."""
    name = SIGNALS[seed % 4]
    victim(folder)
    process = start(folder, *TRAIN)
    time.sleep(random.Random(seed).uniform(0.05, 0.6))
    if process.poll() is None:
        process.send_signal(getattr(signal, name))
    assert finish(process) in (0, 130, -getattr(signal, name)), output(folder)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


# Time limits ---------------------------------------------------------------------------------------------------------


def late(look: int) -> None:
    """Moves the clock to the end at the so-many-th look at it."""
    plain: Callable[[Deadline, float], bool] = Deadline.near
    looks = itertools.count()

    def near(self: Deadline, longest_save: float) -> bool:
        if next(looks) == look:
            self.end = time.time()
        return plain(self, longest_save)

    Deadline.near = near  # type: ignore[method-assign]


@fault("out of time at a look at the clock", short=2, long=21)
def out_of_time(seed: int, folder: Path) -> None:
    look = seed * 5 % 21  # the run looks so many times
    victim(folder)
    code = run(folder, *TRAIN, "--time-limit", "1:00:00", hook=functools.partial(late, look))
    assert "before the time limit: saving" in output(folder), output(folder)
    assert read_json(folder / "run" / "status.json") == {"status": "interrupted", "reason": "time limit"}
    check_polite(folder, code)


# Two processes -------------------------------------------------------------------------------------------------------


def check_two(folder: Path, hooks: list[Any], *words: str) -> None:
    for given in (hooks, [None, None]):
        codes = run_two(folder, *TRAIN, *words, hooks=given)
        assert codes == [0, 0], f"{codes}: {output(folder)}"
    check_whole(folder, unbroken(processes=2))


@fault("a signal to one of two processes", short=1, long=2 * 4 * 4, slow=True)
def one_of_two(seed: int, folder: Path) -> None:
    rank, name, place = of_seed(seed, (1, 0), SIGNALS, ("a step", "validation", "saving", "a checkpoint"))
    victim(folder)
    hooks: list[Any] = [None, None]
    hooks[rank] = functools.partial(send, (name,), place, 1)
    check_two(folder, hooks)


@fault("one of two processes out of time", short=1, long=10, slow=True)
def one_of_two_out_of_time(seed: int, folder: Path) -> None:
    victim(folder)
    hooks: list[Any] = [None, None]
    hooks[1 - seed % 2] = functools.partial(late, 2 * seed)  # the run looks 21 times
    codes = run_two(folder, *TRAIN, "--time-limit", "1:00:00", hooks=hooks)
    assert "before the time limit: saving" in output(folder), f"{codes}: {output(folder)}"
    check_two(folder, [None, None])
