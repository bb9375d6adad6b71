"""A disk that fails: stands between a forked run and its files, counts what is done to them, and breaks at one place.

What is written goes through Python's buffers to `_File.write`, as it goes to the system otherwise, so that a write may
be cut short and a buffer written again when the file is closed.
"""

import builtins
import errno
import functools
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from cleangpt.checkpoints import tensor_files as shards
from cleangpt.data.shuffle import permute
from tests.faults._runs import EXPERIMENT, TRAIN, run, unbroken

FOR_GOOD = 1 << 30
"""So many operations go wrong that no more come."""

COUNT = "operations.txt"
WRITING = {"open", "write", "mkdir", "save_file", "fsync"}
"""What a full disk refuses; it renames and removes as before."""
EVERYTHING = WRITING | {"replace", "unlink", "rmdir", "truncate"}

_rename, _fsync, _unlink = os.replace, os.fsync, os.unlink


class Disk:
    """The operations of a process on its files; `harm` is done at number `at` and the `length` - 1 after it."""

    def __init__(self, harm: Callable[["Disk"], None], at: int, length: int, kinds: set[str]) -> None:
        self.harm, self.at, self.length, self.kinds = harm, at, length, kinds
        self.count, self.lock = 0, threading.RLock()
        self.pending: list[tuple[str, str, bytes | None]] = []
        self.written: dict[str, int] = {}
        """Files of which more was written than flushed, with what was flushed; renames of which the folder was not."""

    def operate(self, kind: str, perform: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Performs an operation, or `half` of it and then what is wrong with the disk."""
        with self.lock:
            number, self.count = self.count, self.count + (kind in self.kinds)
            if kind in self.kinds and self.at <= number < self.at + self.length:
                half()
                self.harm(self)
        return perform()

    # What a power cut takes ---------------------------------------------------------------------------------------

    def wrote(self, path: str, before: int) -> None:
        with self.lock:
            self.written.setdefault(path, before)

    def flushed(self, path: str) -> None:
        with self.lock:
            self.written.pop(path, None)
            self.pending = [entry for entry in self.pending if Path(entry[1]).parent != Path(path)]

    def renamed(self, source: str, target: str, covered: bytes | None) -> None:
        with self.lock:
            self.pending.append((source, target, covered))
            for path in [path for path in self.written if path == source or path.startswith(source + os.sep)]:
                self.written[target + path.removeprefix(source)] = self.written.pop(path)


def _kill(disk: Disk) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _cut_power(disk: Disk) -> None:
    """What was not flushed is not on the disk: neither the content of files nor the renames in folders."""
    for path, size in disk.written.items():
        if Path(path).exists():
            os.truncate(path, size)
    for source, target, covered in reversed(disk.pending):
        if Path(target).exists() and not Path(source).exists():
            _rename(target, source)
            if covered is not None:
                Path(target).write_bytes(covered)
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(number: int) -> Callable[[Disk], None]:
    def refuse(disk: Disk) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def _nothing(disk: Disk) -> None:
    """A disk that counts."""


def _wait(disk: Disk) -> None:
    time.sleep(0.02)


HARMS: dict[str, tuple[Callable[[Disk], None], set[str]]] = {
    "kill": (_kill, EVERYTHING),
    "power cut": (_cut_power, EVERYTHING),
    "full": (_refuse(errno.ENOSPC), WRITING),
    "read-only": (_refuse(errno.EROFS), EVERYTHING),
    "not allowed": (_refuse(errno.EACCES), EVERYTHING),
    "broken": (_refuse(errno.EIO), EVERYTHING),
    "slow": (_wait, {"fsync"}),
}


def install(harm: str, at: int, length: int = 1) -> Disk:
    """Puts the disk in place; for the hook of a run."""
    disk = Disk(HARMS[harm][0], at, length, HARMS[harm][1])
    _patch(disk)
    return disk


@functools.cache
def operations(harm: str, text: str = EXPERIMENT) -> int:
    """Operations on the disk in the whole of a run, as `harm` counts them."""
    folder = unbroken(text)
    assert run(folder, *TRAIN[:-1], f"counted_{harm}", hook=functools.partial(count, harm)) == 0
    return int((folder / COUNT).read_text())


def place(seed: int, harm: str, text: str = EXPERIMENT) -> int:
    """The operation of a seed: every one in turn, those of the first few seeds far apart."""
    number = operations(harm, text)
    return int(permute(np.array([seed % number]), number, 1)[0])


def count(harm: str) -> None:
    """Puts a disk in place that only counts; the number is in operations.txt from then on."""
    disk = Disk(_nothing, 0, 0, HARMS[harm][1])
    _patch(disk)
    operate = disk.operate

    def counted(*given: Any) -> Any:
        done = operate(*given)
        with disk.lock:
            handle = _open(COUNT, os.O_WRONLY | os.O_CREAT)
            os.write(handle, str(disk.count).encode())
            os.close(handle)
        return done

    disk.operate = counted  # type: ignore[method-assign]


_open = os.open


def _patch(disk: Disk) -> None:
    plain_open, plain_mkdir, plain_rmdir, plain_truncate = io.open, os.mkdir, os.rmdir, os.truncate

    def open_file(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
                  newline: Any = None, *rest: Any) -> Any:  # fmt: skip
        if isinstance(file, int) or not set(mode) & set("wax"):
            return plain_open(file, mode, buffering, encoding, errors, newline, *rest)
        raw = disk.operate("open", lambda: _File(disk, file, mode.replace("b", "").replace("t", "")))
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def open_handle(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        def plain() -> int:
            return _open(path, flags, *rest, **named)

        return disk.operate("open", plain) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else plain()

    def fsync(handle: int) -> None:
        disk.operate("fsync", lambda: _fsync(handle))
        disk.flushed(str(Path(f"/proc/self/fd/{handle}").readlink()))

    def replace(source: Any, target: Any, **named: Any) -> None:
        def plain() -> None:
            covered = Path(target).read_bytes() if Path(target).is_file() else None
            _rename(source, target, **named)
            disk.renamed(str(Path(source).absolute()), str(Path(target).absolute()), covered)

        disk.operate("replace", plain)

    def counted(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: disk.operate(kind, lambda: plain(*given, **named))

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        """What Rust writes: half of it, where the disk is full, and its own exception."""

        def plain() -> None:
            disk.wrote(str(Path(path).absolute()), 0)
            written(tensors, path, metadata)

        def half() -> None:
            plain()
            plain_truncate(path, Path(path).stat().st_size // 2)

        try:
            disk.operate("save_file", plain, half)
        except OSError as error:
            text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(text) from None

    written = shards.save_file
    builtins.open = io.open = open_file  # type: ignore[assignment]
    os.open, os.fsync, os.replace, os.rename = open_handle, fsync, replace, replace
    os.unlink = os.remove = counted("unlink", _unlink)
    os.mkdir, os.rmdir = counted("mkdir", plain_mkdir), counted("rmdir", plain_rmdir)
    os.truncate = counted("truncate", plain_truncate)
    shards.save_file = save_file


class _File(io.FileIO):
    """A file that is written through the disk."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.disk, self.path = disk, str(Path(path).absolute())
        if "w" in mode:
            disk.wrote(self.path, 0)

    def write(self, content: Any) -> int:
        """Writes `content`, or the first half of it before the disk breaks."""
        self.disk.wrote(self.path, Path(self.path).stat().st_size)
        content = bytes(content)
        plain = super().write
        return self.disk.operate("write", lambda: plain(content), lambda: plain(content[: len(content) // 2]))

    def truncate(self, size: int | None = None) -> int:
        """Cuts the file."""
        plain = super().truncate
        return self.disk.operate("truncate", lambda: plain(size))
