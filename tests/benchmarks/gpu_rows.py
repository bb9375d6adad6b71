"""Rows for `test_gpu.py` that run in processes of their own, and the command with them in place of the real ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from unittest.mock import patch

from benchmarks.gpu.rows import Row
from benchmarks.gpu.setup import LeftOut, Measurement, Setup


def rows(*names: str, seconds: int = 60) -> tuple[Row, ...]:
    """Rows by the names of functions in this file."""
    return tuple(Row(name, f"tests.benchmarks.gpu_rows.{name}", seconds) for name in names)


def run(chosen: Sequence[Row], words: Sequence[str]) -> int:
    """The command with these rows; returns its exit code."""
    from benchmarks.gpu import __main__ as command  # imports PyTorch, which the rows here do without

    with patch.object(command, "ROWS", tuple(chosen)):
        return command.main(["--toy", *words])


def quick(setup: Setup) -> Iterator[Measurement]:
    yield Measurement("one", 1.5, "GiB", most=2)
    yield Measurement("two", 1234567.0, "tokens/s", least=2e6, note="a | b")


def other(setup: Setup) -> Iterator[Measurement]:
    yield Measurement("three", note="not here")


def failing(setup: Setup) -> Iterator[Measurement]:
    yield Measurement("before the end", 3.0)
    raise ValueError("broken\nin two lines")


def left_out(setup: Setup) -> Iterator[Measurement]:
    raise LeftOut("needs --peer")
    yield


def crashing(setup: Setup) -> Iterator[Measurement]:
    yield Measurement("before the end", 3.0)
    os.kill(os.getpid(), signal.SIGKILL)


def endless(setup: Setup) -> Iterator[Measurement]:
    """Starts another process, whose id it measures, and never ends."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Measurement("child", float(process.pid))
    time.sleep(600)
