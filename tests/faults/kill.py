"""SIGKILL: at random moments, and at every operation on the disk; each run is then taken up and trained to its end."""

import random
import time
from pathlib import Path

from tests.faults import fault
from tests.faults._runs import check_whole, finish, output, run, start, victim

TRAIN = ("train", "victim.py", "--run-dir", "run")
"""What a scheduler starts again after a crash."""


@fault("killed at a random moment", short=3, long=120)
def killed_at_a_random_moment(seed: int, folder: Path) -> None:
    victim(folder)
    process = start(folder, *TRAIN)
    time.sleep(random.Random(seed).uniform(0.02, 0.6))
    process.kill()
    finish(process)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)
