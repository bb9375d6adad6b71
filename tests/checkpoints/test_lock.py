"""One process trains a run at a time; what holds its lock, and what has no locks, is told."""

import errno
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from cleangpt.checkpoints.lock import LOCK, lock_run
from cleangpt.errors import RunFailedError, UserError


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    holder = f"process {os.getpid()} on {platform.node()}"
    with lock_run(tmp_path), pytest.raises(UserError) as refused, lock_run(tmp_path):
        pass
    message = str(refused.value)
    assert (holder in message or sys.platform == "win32") and f"remove {tmp_path / LOCK}" in message


def test_the_lock_of_a_machine_that_is_gone_is_removed_as_the_message_says(tmp_path: Path) -> None:
    """The system that keeps it keeps it for the file that was there."""
    with lock_run(tmp_path):
        (tmp_path / LOCK).unlink()
        with lock_run(tmp_path):
            pass


def test_a_lock_is_free_again_whatever_its_file_says(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on a machine that is gone")
    for _ in range(2):
        with lock_run(tmp_path):
            pass
        assert not (tmp_path / LOCK).read_bytes(), "nobody holds it"


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
@pytest.mark.parametrize(
    ("number", "error", "advice"),
    [
        (errno.ENOLCK, UserError, "give another run_dir"),
        (errno.EOPNOTSUPP, UserError, "give another run_dir"),
        (errno.EINVAL, UserError, "give another run_dir"),
        (errno.EIO, RunFailedError, "when the disk is well, the same command goes on"),
        (errno.ESTALE, RunFailedError, "when the disk is well, the same command goes on"),
    ],
)
def test_a_disk_without_locks_or_a_broken_one_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], advice: str
) -> None:
    import fcntl

    def refuse(*given: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    reason = f"cannot be locked against other processes: {os.strerror(number)}; {advice}"
    with pytest.raises(error, match=reason), lock_run(tmp_path):
        pass
