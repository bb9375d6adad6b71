"""SIGKILL: at random moments, and at every operation on the disk; each run is then taken up and trained to its end."""

import functools
import random
import time
from pathlib import Path

from tests.faults import _disk, fault
from tests.faults._disk import operations, place
from tests.faults._runs import TRAIN, check_whole, finish, output, run, start, victim


@fault("killed at a random moment", short=3, long=60)
def killed_at_a_random_moment(seed: int, folder: Path) -> None:
    victim(folder)
    process = start(folder, *TRAIN)
    time.sleep(random.Random(seed).uniform(0.02, 0.6))
    process.kill()
    finish(process)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


@fault("killed at an operation on the disk", short=4, long=lambda: operations("kill"))
def killed_at_an_operation(seed: int, folder: Path) -> None:
    break_at(seed, folder, "kill")


@fault("power cut at an operation on the disk", short=4, long=lambda: operations("kill"))
def power_cut_at_an_operation(seed: int, folder: Path) -> None:
    break_at(seed, folder, "power cut")


def break_at(seed: int, folder: Path, harm: str) -> None:
    victim(folder)
    code = run(folder, *TRAIN, hook=functools.partial(_disk.install, harm, place(seed, harm)))
    assert code in (-9, 0), output(folder)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)
