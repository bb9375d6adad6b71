"""The process of one row: `python -m benchmarks.gpu.child NAME MODULE.FUNCTION SETUP`; SETUP is JSON.

It ends, with all processes it has started, when the command that started it has.
"""

import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu.journal import append, goal, quantity
from benchmarks.gpu.setup import LeftOut, Measurement, Setup

GLANCE = 0.2
"""Seconds between two looks at whether the command still runs."""


def main(arguments: Sequence[str]) -> int:
    """Runs a row and records what it measures as it goes; returns the exit code."""
    name, function, setup = arguments[0], arguments[1], Setup.from_json(arguments[2])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    setup.folder.mkdir(parents=True)
    began, status, reason = time.monotonic(), "done", ""
    try:
        for entry in load(function)(setup):
            append(setup.results, "measurement", setup.card, name, **entry.to_json())
            print(
                "  ".join(filter(None, (f"  {name}: {entry.what}", quantity(entry), goal(entry), entry.note))),
                flush=True,
            )
    except LeftOut as error:
        status, reason = "left out", str(error)
    except Exception as error:  # whatever a row raises, the others go on
        traceback.print_exc()
        status, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300]
    append(
        setup.results, "end", setup.card, name, status=status, reason=reason, seconds=time.monotonic() - began
    )  # fmt: skip
    shutil.rmtree(setup.folder, ignore_errors=True)
    return int(status == "failed")


def load(function: str) -> Callable[[Setup], Iterator[Measurement]]:
    """The row function MODULE.FUNCTION."""
    module, _, attribute = function.rpartition(".")
    found: Callable[[Setup], Iterator[Measurement]] = getattr(importlib.import_module(module), attribute)
    return found


def _end_with(parent: int) -> None:
    """Kills this process group once the parent has gone, however it went."""
    while os.getppid() == parent:
        time.sleep(GLANCE)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # background threads of a failed trainer must not keep the process
