"""Reward functions by name, and how one is called so that its mistakes do not end a run."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cleangpt.environments.base import Episode

RewardFunction = Callable[[str, str, Episode], float]
"""From the texts of prompt and answer, and the episode, to a reward."""

REWARDS: dict[str, RewardFunction] = {}
"""Your own reward functions by name; registering is one line in your experiment file."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in Python code that takes longer.

    By SIGALRM, so only in the main thread and not on Windows; elsewhere there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Errors:
    """Calls functions that may fail; counts and names what went wrong instead of raising it."""

    def __init__(self, timeout: float, log: Callable[[str], None]) -> None:
        self.timeout, self.log = timeout, log
        self.count = 0
        """Calls that failed since it was last reset."""
        self._named: set[str] = set()

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; None if it raised an exception or took too long. Each kind is logged once."""
        try:
            with time_limit(self.timeout):
                return function(*arguments)
        except Exception as error:
            self.count += 1
            kind = f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"
            if kind not in self._named and len(self._named) < 20:
                self._named.add(kind)
                self.log(f"a reward failed and counts as an error, training continues: {kind}")
            return None
