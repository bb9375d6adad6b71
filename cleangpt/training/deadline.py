"""The time by which a run must have saved and exited, such as the end of a batch job."""

import os
import re
import time
from collections import deque

from cleangpt.errors import UserError

FORMS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS"
SLURM_END = "SLURM_JOB_END_TIME"
"""Environment variable with the time at which SLURM ends the job, in seconds since 1970."""
SPARE = 5.0
"""Seconds reserved for unmeasured work, such as closing the trackers."""
WRITE_RATE = 100e6
"""Bytes per second assumed before a save has been measured: a slow disk."""


def read_time_limit(text: str, now: float) -> float:
    """The end of a time limit that starts `now`, both in seconds since 1970.

    Args:
        text: a duration in SLURM's notation, one of `FORMS`; or `slurm`: the end of this process's job.

    Raises:
        UserError: the text is neither, or this process is not in a job.
    """
    if text == "slurm":
        if not re.fullmatch(r"[0-9]+", os.environ.get(SLURM_END, "")):
            raise UserError(f"--time-limit is 'slurm', but {SLURM_END} is not set; allowed: {FORMS}")
        return float(os.environ[SLURM_END])
    if days := re.fullmatch(r"([0-9]+)-([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text):
        numbers = [int(part or 0) for part in days.groups()]
    elif re.fullmatch(r"[0-9]+(:[0-9]+){0,2}", text):
        parts = [int(part) for part in text.split(":")]
        numbers = [0, *parts] if len(parts) == 3 else [0, 0, *parts, 0][:4]
    else:
        numbers = [0]
    if not any(numbers):
        raise UserError(f"--time-limit is {text!r}; allowed: more than 0 as {FORMS}, or slurm")
    return now + sum(number * unit for number, unit in zip(numbers, (86400, 3600, 60, 1), strict=True))


class Deadline:
    """Decides when a run has to save and exit.

    The reserve is measured: the longest time between two polls, in this macro-batch and the one before (so that the
    first, which may compile, is forgotten), and twice the longest save, since one may be in progress when the last one
    starts. Until a save has been measured, `first_save` seconds are assumed.

    Args:
        end: in seconds since 1970; None: no limit.
        first_save: estimated duration of a save in seconds.
    """

    def __init__(self, end: float | None, first_save: float) -> None:
        self.end, self.first_save = end, first_save
        self._longest = deque([0.0], maxlen=2)
        self._looked = time.monotonic()

    def near(self, longest_save: float) -> bool:
        """Whether the run has to save now; polled between any two pieces of work."""
        now = time.monotonic()
        self._longest[-1] = max(self._longest[-1], now - self._looked)
        self._looked = now
        return self.left < self.reserve(longest_save)

    def reserve(self, longest_save: float) -> float:
        """Seconds needed for saving and exiting."""
        return max(self._longest) + 2 * (longest_save or self.first_save) + SPARE

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.end is None else self.end - time.time()

    def begin_macro_batch(self) -> None:
        """Forgets the work of the macro-batch before the last."""
        self._longest.append(0.0)
