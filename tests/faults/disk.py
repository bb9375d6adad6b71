"""A disk that is full, closed, broken or slow, and files that are not what was written to them.

A run goes on where it can and says in one line what it could not save; when the disk is well, the same command ends
with the same bits. What was whole before stays whole.
"""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from cleangpt.checkpoints.snapshots import FORMAT, list_snapshots
from cleangpt.files import find_corruption, fsync_files, read_json, write_json
from cleangpt.tracking.metrics import read_metrics
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training import saving
from tests.faults import _disk, fault
from tests.faults._disk import FOR_GOOD, operations, place
from tests.faults._runs import EXPERIMENT, TRAIN, check_whole, output, run, unbroken, victim

LONGEST = 20_000
"""Bytes: no file of the victim's run is longer."""


def check_told(folder: Path, code: int) -> None:
    """Asserts that a run on a bad disk ended in order: told in lines, and all that stands under its name is whole."""
    said = output(folder)
    assert code in (0, 1), f"exit code {code}: {said}"
    assert "Traceback" not in said, said
    assert code == 0 or said.splitlines()[-1].startswith("stopped: "), said
    for kept in (folder / "run" / "snapshots", folder / "run" / "checkpoints"):
        for path in kept.glob("*"):
            if path.is_dir() and not path.name.endswith((".partial", ".old")):
                assert find_corruption(path) == "", f"{path}: {find_corruption(path)}"


def check_goes_on(folder: Path) -> None:
    """Asserts that the same command, on a disk that is well, comes to the weights of the unbroken run."""
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder, checkpoints=False)


def go_wrong(folder: Path, harm: str, at: int, length: int) -> int:
    victim(folder)
    code = run(folder, *TRAIN, hook=functools.partial(_disk.install, harm, at, length))
    check_told(folder, code)
    return code


@fault("disk full at a write, for a moment", short=2, long=lambda: operations("full"))
def full_for_a_moment(seed: int, folder: Path) -> None:
    code = go_wrong(folder, "full", place(seed, "full"), 1)
    if code == 0:
        check_whole(folder, checkpoints=False)
    check_goes_on(folder)


@fault("disk full from a write on", short=2, long=lambda: operations("full"))
def full_for_good(seed: int, folder: Path) -> None:
    go_wrong(folder, "full", place(seed, "full"), FOR_GOOD)
    check_goes_on(folder)


@fault("room is made while the last snapshot waits for it", short=1, long=10, slow=True)
def full_until_the_end(seed: int, folder: Path) -> None:
    victim(folder, PATIENT)
    first = operations("full") // 2 + 7 * seed
    code = run(folder, *TRAIN, hook=functools.partial(full_until_told, first))
    assert code == 0 and "trying again for 60 s" in output(folder), output(folder)
    check_whole(folder, unbroken(PATIENT), checkpoints=False)


PATIENT = EXPERIMENT.replace("patience=0", "patience=60")


def full_until_told(at: int) -> None:
    """A disk that is full until the trainer has said that it waits."""
    saving.PAUSE = 1
    said = ProgressBar.log
    disk = _disk.install("full", at, FOR_GOOD)

    def log(self: ProgressBar, text: str) -> None:
        said(self, text)
        if text.startswith("trying again"):
            disk.length = 0

    ProgressBar.log = log  # type: ignore[method-assign]


@fault("disk read-only, closed or broken from an operation on", short=2, long=120)
def broken_for_good(seed: int, folder: Path) -> None:
    go_wrong(folder, ("read-only", "not allowed", "broken")[seed % 3], place(seed, "broken"), FOR_GOOD)
    check_goes_on(folder)


@fault("disk read-only, closed or broken for one operation", short=2, long=120)
def broken_for_a_moment(seed: int, folder: Path) -> None:
    go_wrong(folder, ("read-only", "not allowed", "broken")[seed % 3], place(seed, "broken"), 1)
    check_goes_on(folder)


@fault("disk slow to flush", short=1, long=5, slow=True)
def slow(seed: int, folder: Path) -> None:
    assert go_wrong(folder, "slow", 0, FOR_GOOD) == 0
    check_whole(folder)


def limit(size: int) -> None:
    """The system refuses what would make a file longer, after it has written what fits."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@fault("files truncated by the system's limit", short=2, long=40)
def cut_short(seed: int, folder: Path) -> None:
    victim(folder)
    size = 3000 + (LONGEST - 3000) * (seed * 17 % 40) // 40
    check_told(folder, run(folder, *TRAIN, hook=functools.partial(limit, size)))
    check_goes_on(folder)


@fault("a small disk of the system's, full", short=0, long=30)
def small_disk(seed: int, folder: Path) -> None:
    """A file system in memory with room for a part of the run; only root may make one."""
    victim(folder)
    (folder / "run").mkdir()
    size = f"size={20 + 4 * seed}k"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder / "run")], capture_output=True)
    if made.returncode != 0:
        pytest.skip("not allowed to mount a file system")
    try:
        check_told(folder, run(folder, *TRAIN))
        subprocess.run(["mount", "-o", "remount,size=10m", str(folder / "run")], check=True)
        check_goes_on(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder / "run")], check=True)


# Files that are not what was written ---------------------------------------------------------------------------------

FILES = ("shard_00000.safetensors", "index.json", "state.json", "manifest.json")
HARMS = ("bits flipped", "cut short", "empty", "missing")


def harm(path: Path, what: str, where: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[where % len(content)] ^= 1 << where % 8
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes({"bits flipped": content, "cut short": content[: len(content) // 2], "empty": b""}[what])


def finished(folder: Path) -> Path:
    """The unbroken run, in `folder`; returns its snapshots."""
    shutil.copytree(unbroken(), folder, dirs_exist_ok=True)
    (folder / "output.txt").unlink()
    return folder / "run" / "snapshots"


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a run that matters."""
    return {
        str(path): path.read_bytes()
        for path in (folder / "run").rglob("*")
        if path.is_file() and path.name not in ("lock", "log.txt")
    }


@fault("newest snapshot: a file flipped, truncated, empty or missing", short=4, long=64)
def newest_damaged(seed: int, folder: Path) -> None:
    newest = list_snapshots(finished(folder))[0]
    harm(newest / FILES[seed % 4], HARMS[seed // 4 % 4] if seed >= 4 else HARMS[seed], 7919 * seed)
    check_goes_on(folder)
    said = output(folder)
    assert f"snapshot run/snapshots/{newest.name} is corrupt (" in said and "; using the one before it" in said
    assert "resuming from run/snapshots/mb000002" in said


@fault("all snapshots corrupt", short=1, long=16)
def all_damaged(seed: int, folder: Path) -> None:
    for number, path in enumerate(list_snapshots(finished(folder))):
        harm(path / FILES[(seed + number) % 4], HARMS[seed // 4 % 4], 104_729 * seed)
    refused(folder, "every snapshot in run/snapshots is corrupt, ")


@fault("snapshot of a newer version", short=1, long=2)
def newer(seed: int, folder: Path) -> None:
    newest = list_snapshots(finished(folder))[0]
    format = FORMAT + 1 + seed
    state = read_json(newest / "state.json") | {"format": format}
    write_json(newest / "state.json", state)
    write_json(newest / "manifest.json", fsync_files([newest / name for name in FILES[:3]]))
    refused(
        folder,
        f"{Path('run/snapshots') / newest.name} has snapshot format {format}; this version reads {FORMAT}; resume",
    )


@fault("dataset: a file truncated, empty or missing", short=1, long=12)
def store_damaged(seed: int, folder: Path) -> None:
    finished(folder)
    names = ("train_00000.bin", "train_00000.mask", "val_00000.bin", "tokenizer.json")
    (store,) = (folder / "data").iterdir()
    harm(store / names[seed % 4], HARMS[1 + seed // 4 % 3])
    refused(folder, f"data/{store.name}/{names[seed % 4]}")


def refused(folder: Path, words: str) -> None:
    """Asserts that a run is refused in one line with `words`, and that nothing of it has changed."""
    before = files(folder)
    assert run(folder, *TRAIN) == 2, output(folder)
    last = output(folder).splitlines()[-1]
    assert last.startswith("error: ") and words in last and "Traceback" not in output(folder), output(folder)
    assert files(folder) == before and len(read_metrics(folder / "run")) == 3
