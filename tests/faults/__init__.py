"""Faults, and what becomes of a run: each is a trial that injects one once and compares what is left.

`test_faults.py` tries a few of each; `python -m tests.faults` tries them at every place and prints a table.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Trial = Callable[[int, Path], None]
"""Injects a fault once, in an empty folder; raises when something is lost. The seed says where or when."""


@dataclass(frozen=True)
class Fault:
    """One row of the table: the tests try seeds 0 to `short` - 1, and the long form 0 to `long` - 1."""

    name: str
    trial: Trial
    short: int
    long: int | Callable[[], int]
    slow: bool = False
    """Whether even the first seed is left out of the default tests; the others are."""

    def tries(self) -> int:
        """How many seeds the long form tries."""
        return self.long if isinstance(self.long, int) else self.long()


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, *, short: int = 1, long: int | Callable[[], int] = 10, slow: bool = False
) -> Callable[[Trial], Trial]:
    """Registers a trial under `name`, which says what happens, such as "killed at a random moment"."""

    def register(trial: Trial) -> Trial:
        assert name not in FAULTS
        FAULTS[name] = Fault(name, trial, short, long, slow)
        return trial

    return register


def find_faults() -> dict[str, Fault]:
    """Every fault of every module of this folder."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith(("_", "test_")):
            importlib.import_module(f"{__name__}.{module.name}")
    return FAULTS
