"""The lock of a run folder: one process trains it at a time."""

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from cleangpt.errors import RunFailedError, UserError

LOCK = "lock"
LOCKLESS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a disk without locks answers."""


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Locks a run against other processes; the system releases the lock of a process that dies.

    The lock file names its holder, since a network disk may keep the lock of a machine that has lost its power.

    Raises:
        UserError: another process is training it, or the disk has no locks.
        RunFailedError: the disk is broken.
    """
    lock: BaseFileLock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run} is being trained by {_holder(run)}; wait for it, or stop it first; if its machine is gone, remove "
            f"{run / LOCK}"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = f"{run} cannot be locked against other processes: {getattr(error, 'strerror', None) or error}"
        if isinstance(error, OSError) and error.errno not in LOCKLESS:
            raise RunFailedError(f"{reason}; when the disk is well, the same command goes on") from None
        raise UserError(f"{reason}; give another run_dir") from None
    soft = isinstance(lock, SoftFileLock)  # where a disk has no locks, filelock's own file stands for one
    try:
        with contextlib.suppress(OSError):  # a full disk
            if not soft:
                (run / LOCK).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            if not soft:
                os.truncate(run / LOCK, 0)
        lock.release()


def _holder(run: Path) -> str:
    """The process that holds the lock of a run, as far as it is known."""
    try:
        named = (run / LOCK).read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:  # Windows refuses to read a locked file
        named = ""
    return named if named.startswith("process ") else "another process"
