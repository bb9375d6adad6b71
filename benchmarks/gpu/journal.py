"""The results: a journal in JSON lines, to which every process appends what it has, and the table made of it.

    {"event": "start", "card": "NVIDIA H100", "row": "precisions", "machine": "2026-11-26 … PyTorch 2.11.0", …}
    {"event": "measurement", "card": …, "row": …, "what": "GPT, bf16: logits", "value": 0.004, "most": 0.02, …}
    {"event": "end", "card": …, "row": …, "status": "done", "seconds": 21.5, "reason": ""}

A line is written as soon as it is known, so that a process killed at any moment loses no more than the line it was
writing. A row that is started again replaces what it measured before.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import Measurement
from cleangpt.files import write_text

UNFINISHED = "interrupted"
"""Status of a row whose end is not in the journal."""


@dataclass
class Outcome:
    """What is known of one row on one card."""

    status: str = UNFINISHED
    """done, failed, timed out, left out or interrupted."""
    reason: str = ""
    """Why it is not done."""
    seconds: float = 0.0
    machine: str = ""
    """Date, machine and versions."""
    measurements: list[Measurement] = field(default_factory=list)


def append(path: Path, event: str, card: str, row: str, **entries: Any) -> None:
    """Appends one line to the journal, after ending a line that a killed process left torn."""
    line = json.dumps({"event": event, "card": card, "row": row, **entries}, ensure_ascii=False) + "\n"
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line)


def read(path: Path) -> dict[str, dict[str, Outcome]]:
    """The outcomes by card and row; torn lines are skipped."""
    found: dict[str, dict[str, Outcome]] = {}
    for entry in _lines(path):
        event, card, row = entry.pop("event"), entry.pop("card"), entry.pop("row")
        rows = found.setdefault(card, {})
        if event == "start":
            rows[row] = Outcome(**entry)
        elif event == "measurement":
            rows[row].measurements.append(Measurement(**entry))
        else:
            vars(rows[row]).update(entry)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        yield entry


def table(outcomes: dict[str, dict[str, Outcome]], order: Sequence[str]) -> str:
    """The results as Markdown: a section for each card, and what is missing in it."""
    sections = []
    for card, rows in outcomes.items():
        machine = next((outcome.machine for outcome in reversed(rows.values()) if outcome.machine), "")
        lines = [f"### {card}", "", f"{machine}.", "", "| row | what | value | goal | |", "|---|---|---:|---|---|"]
        names = [*order, *(row for row in rows if row not in order)]
        for name in names:
            lines += ["| " + " | ".join(cells) + " |" for cells in _cells(name, rows.get(name, Outcome()))]
        missing = [f"- {name}: {_why(rows.get(name))}" for name in names if _why(rows.get(name))]
        lines += ["", "Not complete:", "", *missing] if missing else []
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _cells(name: str, outcome: Outcome) -> Iterator[tuple[str, ...]]:
    for entry in outcome.measurements:
        yield name, entry.what, quantity(entry), goal(entry), entry.note.replace("|", "/")


def _why(outcome: Outcome | None) -> str:
    """Why a row is not complete; empty if it is."""
    if outcome is None:
        return "not run"
    return "" if outcome.status == "done" else f"{outcome.status}{': ' * bool(outcome.reason)}{outcome.reason}"


def quantity(entry: Measurement) -> str:
    """The value with its unit: whole numbers from 1,000 on, else three digits."""
    if entry.value is None:
        return "—"
    number = f"{entry.value:,.0f}" if abs(entry.value) >= 1000 else f"{entry.value:.3g}"
    return f"{number} {entry.unit}".strip()


def goal(entry: Measurement) -> str:
    """The goal, and whether it was met; empty: there is none."""
    bounds = [f"≥ {entry.least:,g}"] if entry.least is not None else []
    bounds += [f"≤ {entry.most:,g}"] if entry.most is not None else []
    said = {True: ": met", False: ": **missed**", None: ""}[entry.met]
    return f"{' and '.join(bounds)}{said}" if bounds else ""


def write_table(path: Path, outcomes: dict[str, dict[str, Outcome]], order: Sequence[str]) -> None:
    """Writes the table next to the journal."""
    write_text(path, table(outcomes, order))
