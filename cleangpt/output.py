"""Output whose reader may leave, such as `head` or a terminal that closes: it is dropped, and the work goes on."""

import contextlib
import os
import sys
from typing import IO, Any


def say(text: str = "", file: IO[str] | None = None) -> None:
    """Prints a line at once to `file` (None: standard output), for whoever still reads; an error is no reason to stop.

    For work that must not end with its reader. What only makes text, such as sample, prints, and ends with its reader.
    """
    stream = file or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        discard(stream)


def discard(stream: IO[Any] | None) -> None:
    """Points a stream that cannot be written to the null device: later lines, and Python's exit, do not fail then."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # closed, or without a file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
