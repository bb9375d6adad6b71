"""SIGKILL and power cuts, at random moments and at every operation on the disk; then each run is trained to its end."""

import functools
import random
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

from cleangpt.distributed import processes as ranks
from tests.faults import _disk, fault
from tests.faults._disk import operations, place
from tests.faults._runs import (
    EXPERIMENT,
    TRAIN,
    check_whole,
    finish,
    output,
    run,
    run_two,
    start,
    start_two,
    unbroken,
    victim,
)

SYNCHRONOUS = EXPERIMENT.replace("patience=0", "patience=0, async_snapshots=False, checkpoint_every=2")


def kill_at(folder: Path, harm: str, place: int) -> None:
    """Runs the victim until it is killed at operation `place`, which may be after its last."""
    code = run(folder, *TRAIN, hook=functools.partial(_disk.install, harm, place))
    assert code in (-signal.SIGKILL, 0), output(folder)


def check_goes_on(folder: Path, text: str = EXPERIMENT) -> None:
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder, unbroken(text))


@fault("killed at a random moment", short=2, long=60)
def killed_at_a_random_moment(seed: int, folder: Path) -> None:
    victim(folder)
    process = start(folder, *TRAIN)
    time.sleep(random.Random(seed).uniform(0.02, 0.6))
    process.kill()
    finish(process)
    check_goes_on(folder)


@fault("killed at an operation on the disk", short=2, long=lambda: operations("kill"))
def killed_at_an_operation(seed: int, folder: Path) -> None:
    victim(folder)
    kill_at(folder, "kill", place(seed, "kill"))
    check_goes_on(folder)


@fault("power cut at an operation on the disk", short=2, long=lambda: operations("kill"))
def power_cut_at_an_operation(seed: int, folder: Path) -> None:
    victim(folder)
    kill_at(folder, "power cut", place(seed, "kill"))
    check_goes_on(folder)


@fault("killed or cut off five times in one run", short=1, long=40, slow=True)
def killed_again_and_again(seed: int, folder: Path) -> None:
    """Saving as training waits, with checkpoints kept for good; kills fall into the cleaning up after kills as well."""
    victim(folder, SYNCHRONOUS)
    chance = random.Random(seed)
    for _ in range(5):
        kill_at(folder, chance.choice(["kill", "power cut"]), chance.randrange(operations("kill") // 2))
    check_goes_on(folder, SYNCHRONOUS)


@fault("killed while the corpus is prepared", short=1, long=40)
def killed_while_preparing(seed: int, folder: Path) -> None:
    victim(folder)
    shutil.rmtree(folder / "data")
    kill_at(folder, ("kill", "power cut")[seed % 2], seed)
    check_goes_on(folder)


# Two processes -------------------------------------------------------------------------------------------------------


def impatient() -> None:
    """Asks the others for word of the lost one for a moment only."""
    ranks.PATIENCE = timedelta(seconds=0.3)


def dying(at: int) -> None:
    impatient()
    _disk.install("kill", at)


@fault("one of two processes killed at an operation on the disk", short=1, long=40, slow=True)
def one_of_two_killed(seed: int, folder: Path) -> None:
    """The other ends by itself, in one line, and both are started again."""
    rank = seed % 2
    victim(folder)
    hooks = [impatient, impatient]
    hooks[rank] = functools.partial(dying, place(seed, "kill") if rank == 0 else seed % 12)
    codes = run_two(folder, *TRAIN, hooks=hooks)
    check_codes(folder, codes)
    check_two_go_on(folder)


def check_codes(folder: Path, codes: list[int]) -> None:
    """One of two may be killed at the end, when the other needs it no more, or after it."""
    fine = ([-signal.SIGKILL, 1], [1, -signal.SIGKILL], [-signal.SIGKILL, 0], [0, -signal.SIGKILL], [0, 0])
    assert codes in fine, f"{codes}: {output(folder)}"


@fault("both of two processes killed at a random moment", short=1, long=20, slow=True)
def both_killed(seed: int, folder: Path) -> None:
    victim(folder)
    processes = start_two(folder, *TRAIN)
    time.sleep(random.Random(seed).uniform(0.05, 1.5))
    for process in processes:
        process.kill()
    for process in processes:
        finish(process)
    check_two_go_on(folder)


def check_two_go_on(folder: Path) -> None:
    codes = run_two(folder, *TRAIN)
    assert codes == [0, 0], f"{codes}: {output(folder)}"
    check_whole(folder, unbroken(processes=2))
