"""A polite end: the first signal asks the loop to finish its step and save, a second Ctrl-C stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOPS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


SAVE: int | None = getattr(signal, "SIGUSR1", None)
"""SIGHUP and SIGUSR1 are not on Windows."""


class StopRequest:
    """While entered, turns SIGINT (Ctrl-C), SIGTERM and SIGHUP into `requested`, SIGUSR1 into `save_requested`.

    A SIGTERM may come twice, from a scheduler and from torchrun, and stays one request. A SIGHUP says that the terminal
    has gone; under nohup it stays ignored.

    Raises:
        KeyboardInterrupt: at a SIGINT after another signal to stop.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """The name of the first signal to stop."""
        self.save_requested = False
        """Whoever saves sets it back."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                    self._before[number] = signal.signal(number, self._stop)
            if SAVE is not None:
                self._before[SAVE] = signal.signal(SAVE, self._save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        _say(f"{self.requested}: finishing the step and saving; another Ctrl-C stops at once")

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True
        _say("SIGUSR1: finishing the step and saving, then going on")


def _say(text: str) -> None:
    """Writes a line from a signal handler: print() may not be re-entered from one, and the terminal may have gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def without(number: int | None) -> Iterator[None]:
    """While entered, a signal is ignored; None: it does not exist on this system."""
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
