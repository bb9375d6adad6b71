"""When a run must have saved and ended, such as the end of a batch job, and how much of that time saving takes."""

import os
import re
import time
from collections import deque

from cleangpt.errors import UserError

FORMS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS"
SLURM_END = "SLURM_JOB_END_TIME"
"""In a job's environment: when SLURM will end it, in seconds since 1970."""
SPARE = 5.0
"""Seconds for what is not measured, such as closing the trackers."""
WRITE_RATE = 100e6
"""Bytes per second that a save is reckoned with before one was measured: a slow disk."""


def read_time_limit(text: str, now: float) -> float:
    """When a time limit that begins `now` ends, both in seconds since 1970.

    Args:
        text: a duration as SLURM writes it, one of `FORMS`; or `slurm`: the end of the job that this process is in.

    Raises:
        UserError: the text is neither, or there is no such job.
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
    """Says when it is time to save and end.

    The reserve is measured: the longest piece of work between two looks at the clock, in this macro-batch and the one
    before (so that the first, which may compile, is forgotten), and twice the longest save, since one may be under way
    when the last is asked for. Until something was saved, `first_save` seconds stand for that.

    Args:
        end: in seconds since 1970; None: never.
    """

    def __init__(self, end: float | None, first_save: float) -> None:
        self.end, self.first_save = end, first_save
        self._longest = deque([0.0], maxlen=2)
        self._looked = time.monotonic()

    def near(self, longest_save: float) -> bool:
        """Whether so little time is left that the run must save now; asked between any two pieces of work."""
        now = time.monotonic()
        self._longest[-1] = max(self._longest[-1], now - self._looked)
        self._looked = now
        return self.left < self.reserve(longest_save)

    def reserve(self, longest_save: float) -> float:
        """Seconds before the end at which to save."""
        return max(self._longest) + 2 * (longest_save or self.first_save) + SPARE

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.end is None else self.end - time.time()

    def begin_macro_batch(self) -> None:
        """Forgets the work of the macro-batch before the last."""
        self._longest.append(0.0)
