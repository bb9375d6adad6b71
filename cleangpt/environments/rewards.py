"""Reward functions by name, and how one is called so that its mistakes do not end a run."""

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from cleangpt.environments.base import Episode
from cleangpt.environments.verifiers import boxed, contains, length, number, repetition, thought

RewardFunction = Callable[[str, str, Episode], float | Sequence[float] | None]
"""From the texts of prompt and answer, and the episode, to a reward, or to a list of one for each action; None: it does
not score this answer."""

REWARDS: dict[str, RewardFunction] = {
    "boxed": boxed,
    "contains": contains,
    "length": length,
    "number": number,
    "repetition": repetition,
    "thought": thought,
}
"""Reward functions by name; registering your own is one line in your experiment file."""
NAMED = 20
"""Kinds of errors that are logged."""


class Errors:
    """Calls functions that may fail; counts and names what went wrong instead of raising it.

    Within a `with` block over it, a function that takes longer than `timeout` seconds has failed. That is by SIGALRM,
    so only in the main thread and not on Windows; elsewhere there is no limit.
    """

    def __init__(self, timeout: float, log: Callable[[str], None]) -> None:
        self.timeout, self.log = timeout, log
        self.count = 0
        """Calls that failed since it was last reset."""
        self._named: set[str] = set()
        self._before: Any = None
        self._limited = False

    def __enter__(self) -> "Errors":
        self._limited = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self._limited:
            self._before = signal.signal(signal.SIGALRM, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._limited:
            signal.signal(signal.SIGALRM, self._before)
        self._limited = False

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; None if it raised an exception or took too long. Each kind is logged once."""
        try:
            if not self._limited:
                return function(*arguments)
            signal.setitimer(signal.ITIMER_REAL, self.timeout)
            try:
                return function(*arguments)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Exception as error:
            self.count += 1
            kind = f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"
            if kind not in self._named and len(self._named) < NAMED:
                self._named.add(kind)
                self.log(f"a reward failed and counts as an error, training continues: {kind}")
            return None

    def _interrupt(self, number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {self.timeout:g} s")
