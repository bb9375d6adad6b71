"""Graceful shutdown: the first signal finishes the step and saves; a second Ctrl-C stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

# SIGHUP and SIGUSR1 do not exist on Windows.
STOP_SIGNALS = [
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
]
SAVE_SIGNAL: int | None = getattr(signal, "SIGUSR1", None)


class StopRequest:
    """While entered, SIGINT (Ctrl-C), SIGTERM and SIGHUP set `requested`, and SIGUSR1 sets `save_requested`.

    A second SIGTERM changes nothing: a scheduler and torchrun may both send one. SIGHUP means that the terminal has
    closed; it stays ignored under nohup.

    Raises:
        KeyboardInterrupt: on SIGINT after an earlier signal to stop.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal to stop."""
        self.save_requested = False
        """Reset by whoever saves."""
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                    self._previous_handlers[number] = signal.signal(number, self._request_stop)
            if SAVE_SIGNAL is not None:
                self._previous_handlers[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, self._request_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        _write_to_stderr(f"{self.requested}: finishing the step and saving; press Ctrl-C again to stop at once")

    def _request_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True
        _write_to_stderr("SIGUSR1: saving after this step, then continuing")


def _write_to_stderr(text: str) -> None:
    """Writes a line from a signal handler, where print() is not reentrant and the terminal may be closed."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def ignore_signal(number: int | None) -> Iterator[None]:
    """Ignores a signal while entered; None: this system does not have it."""
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)
