"""Processes that want the same run, the same folder or the same corpus."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cleangpt.corpora.adder import Adder
from tests.faults import fault
from tests.faults._runs import TRAIN, check_whole, finish, output, run, run_two, start, start_two, unbroken, victim
from tests.forked import Command

REFUSED = "run is being trained by process "


def wait_until(condition: Callable[[], bool], process: Command) -> None:
    """Waits as long as the process is alive."""
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_go() -> None:
    """Waits for the file `go`."""
    deadline = time.monotonic() + 60
    while not Path("go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def slow_steps() -> None:
    """Makes a run last until the others have been refused."""
    from cleangpt.training.trainer import Trainer

    step = Trainer.step

    def slowly(self: Trainer) -> None:
        wait_for_go()
        step(self)

    Trainer.step = slowly  # type: ignore[method-assign]


@fault("a second process on a run whose first is then killed", short=1, long=10, slow=True)
def second(seed: int, folder: Path) -> None:
    """The second is refused and has changed nothing; the dead one holds nothing."""
    victim(folder)
    first = start(folder, *TRAIN, hook=slow_steps)
    wait_until(lambda: (folder / "run" / "experiment.json").exists(), first)
    before = {path: path.read_bytes() for path in (folder / "run").glob("*.json")}
    for words in (TRAIN, ("resume", "run", "--optimizer.lr", "0.5")):
        assert run(folder, *words) == 2 and REFUSED in output(folder), output(folder)
    assert {path: path.read_bytes() for path in (folder / "run").glob("*.json")} == before
    first.send_signal((signal.SIGKILL, signal.SIGTERM)[seed % 2])
    (folder / "go").touch()
    finish(first)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


@fault("two processes that start the same run at once", short=1, long=20)
def at_once(seed: int, folder: Path) -> None:
    victim(folder)
    processes = [start(folder, *TRAIN)]
    time.sleep(random.Random(seed).uniform(0, 0.1))
    processes.append(start(folder, *TRAIN))
    codes = sorted(finish(process) for process in processes)
    assert codes in ([0, 2], [0, 0]), f"{codes}: {output(folder)}"
    check_whole(folder)


@fault("a second launch of two processes on a run of two", short=1, long=5, slow=True)
def second_launch(seed: int, folder: Path) -> None:
    """Each of its processes ends in one line; the first goes on."""
    victim(folder)
    first: list[Any] = start_two(folder, *TRAIN, hooks=[slow_steps, slow_steps])
    wait_until(lambda: (folder / "run" / "experiment.json").exists(), first[0])
    codes = run_two(folder, *TRAIN)
    said = output(folder)
    assert codes == [2, 2] and said.count(REFUSED) == 2, f"{codes}: {said}"
    (folder / "go").touch()
    assert [finish(process) for process in first] == [0, 0], output(folder)
    check_whole(folder, unbroken(processes=2))


def dies_preparing() -> None:
    """Kills the process when it has begun to prepare, and another has begun to wait."""
    plain = Adder.prepare

    def dying(self: Adder, *given: Any) -> Any:
        Path("preparing").touch()
        wait_for_go()
        plain(self, *given)
        os.kill(os.getpid(), signal.SIGKILL)

    Adder.prepare = dying  # type: ignore[method-assign]


@fault("processes that prepare the same corpus at once", short=1, long=10)
def preparing(seed: int, folder: Path) -> None:
    victim(folder)
    shutil.rmtree(folder / "data")
    processes = [start(folder, *TRAIN[:-1], name) for name in ("run", "other", "third")]
    assert [finish(process) for process in processes] == [0, 0, 0], output(folder)
    check_whole(folder)


@fault("a process preparing a corpus is killed while another waits for it", short=1, long=5)
def killed_preparing(seed: int, folder: Path) -> None:
    victim(folder)
    shutil.rmtree(folder / "data")
    first = start(folder, *TRAIN, hook=dies_preparing)
    wait_until(lambda: (folder / "preparing").exists(), first)
    other = start(folder, *TRAIN)
    wait_until(lambda: "another process is preparing" in output(folder).replace("\n", " "), other)
    (folder / "go").touch()
    assert (finish(first), finish(other)) == (-signal.SIGKILL, 0), output(folder)
    check_whole(folder)
