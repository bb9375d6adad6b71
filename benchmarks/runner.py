"""Interleaved measurements of ours and its peers (A B A B ...), and their ratios as a table."""

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cleangpt.files import write_text

T = TypeVar("T")
UNITS: Mapping[str, Sequence[tuple[float, str]]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "nats": ((0.0, "nats"),),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
}
HEADER = """\
# Results

Written by `python -m benchmarks`; what is measured and how to read it is in [README.md](README.md).
"""


@dataclass(frozen=True)
class Setup:
    """What every benchmark gets."""

    folder: Path
    """Empty folder for its files, on the disk to be measured."""
    quick: bool = False
    """Smoke test: small sizes and few repetitions, whose results mean nothing."""
    peer: Path | None = None
    """A checkout of nanoGPT."""
    text: Path | None = None
    """Tiny Shakespeare; None: download it."""

    @property
    def repetitions(self) -> int:
        """Rounds of every comparison."""
        return 1 if self.quick else 7


@dataclass(frozen=True)
class Row:
    """One comparison. Both sides are costs, so a ratio below 1 is in our favour."""

    what: str
    unit: str
    """A key of UNITS."""
    ours: Sequence[float]
    """One measurement per repetition."""
    peer: str
    """What we are compared with."""
    theirs: Sequence[float]
    """One measurement per repetition, in the same round as ours."""
    goal: float | None = None
    """The largest acceptable median ratio; None: no goal."""

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, one per repetition."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def cells(self) -> list[str]:
        """The cells of the row: what, ours, peer, median ratio, spread, goal."""
        ratio = statistics.median(self.ratios)
        goal = "" if self.goal is None else f"≤ {self.goal:g}: {'met' if ratio <= self.goal else 'missed'}"
        ours, theirs = (quantity(statistics.median(side), self.unit) for side in (self.ours, self.theirs))
        spread = f"{min(self.ratios):.3g} to {max(self.ratios):.3g}"
        return [self.what, ours, f"{self.peer}: {theirs}", f"{ratio:.3g}", spread, goal]


def interleave(measures: Mapping[str, Callable[[], T]], repetitions: int, warm_up: bool = True) -> dict[str, list[T]]:
    """Calls every measure in turn, round after round, so that a change in the machine's load affects all alike.

    Returns:
        For every name the results of its measure, in order, without the warm-up round.
    """
    for measure in measures.values() if warm_up else ():
        measure()
    taken: dict[str, list[T]] = {name: [] for name in measures}
    for _ in range(repetitions):
        for name, measure in measures.items():
            taken[name].append(measure())
    return taken


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Has PyTorch compute on one thread, as CPU times need to be compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds that this process spends on a piece of work."""
    began = time.process_time()
    work()
    return time.process_time() - began


def quantity(value: float, unit: str) -> str:
    """A value with a unit prefix, to three digits: ``1.25 ms``; nats to four."""
    factor, name = next((entry for entry in UNITS[unit] if abs(value) >= entry[0]), UNITS[unit][-1])
    if not factor:
        return f"{value:.4g} {name}"
    scaled = value / factor
    return f"{scaled:.0f} {name}" if scaled >= 100 else f"{scaled:.3g} {name}"


def section(about: str, machine: str, rows: Sequence[Row]) -> str:
    """The Markdown of one benchmark, without its heading."""
    columns = ("", "ours", "peer or limit", "ratio", "spread", "goal")
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *(row.cells() for row in rows))]
    lines.insert(1, "|---|---:|---:|---:|---:|---|")
    rounds = f"{' or '.join(map(str, sorted({len(row.ours) for row in rows})))} interleaved repetitions"
    return f"{about.strip()}\n\n{machine}. {rounds}.\n\n" + "\n".join(lines) + "\n"


def write_section(path: Path, name: str, text: str, order: Sequence[str]) -> None:
    """Puts `text` under the heading `name` into the Markdown file `path`, replacing an earlier section of that name.

    The other sections stay as they are, in the order of their names in `order`.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = re.split(r"^## (.+)\n", before, flags=re.MULTILINE)
    sections = {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}
    sections[name] = text.strip()
    ordered = sorted(sections, key=lambda title: order.index(title) if title in order else len(order))
    write_text(path, "\n".join([HEADER, *(f"## {title}\n\n{sections[title]}\n" for title in ordered)]))
