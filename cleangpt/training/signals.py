"""A polite end: the first signal asks the loop to finish its step and save, a second Ctrl-C stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, turns SIGINT (Ctrl-C) and SIGTERM into `requested`, the signal's name.

    A SIGTERM may come twice, from a scheduler and from torchrun, and stays one request.

    Raises:
        KeyboardInterrupt: at a SIGINT after another signal.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        # print() may not be re-entered from a handler; a plain write may.
        os.write(2, f"\n{self.requested}: finishing the step and saving; another Ctrl-C stops at once\n".encode())


@contextlib.contextmanager
def without_sigterm() -> Iterator[None]:
    """While entered, SIGTERM is ignored: torchrun sends it when one process has died, before the others can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
