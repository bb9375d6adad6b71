"""A long run in miniature: what it holds and what a macro-batch costs stay as they are, however many came before."""

import functools
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cleangpt.training.trainer import Trainer
from tests.faults import fault
from tests.faults._runs import EXPERIMENT, finish, output, start, victim

MARGIN = 8 * 2**20
"""Bytes by which memory may differ between two quarters of a run."""
NOTES = "notes.jsonl"


def watch() -> None:
    """Has the trainer of this process write down, after every macro-batch, what it holds and which files it opened."""
    opened: Counter[str] = Counter()

    def note_open(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            reads = "r" in str(arguments[1] or "") and "metrics.jsonl" in str(arguments[0])
            opened.update(["opened", *(["metrics read"] if reads else [])])

    sys.addaudithook(note_open)
    original = Trainer.save_snapshot

    def save_snapshot(trainer: Trainer) -> None:
        original(trainer)
        facts = {
            "seconds": time.perf_counter(),
            "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            "threads": threading.active_count(),
            # One snapshot is being written, and perhaps one removed, in a thread.
            "files": sum(len(names) for path, _, names in os.walk(trainer.run) if "snapshots" not in path),
            "snapshots": len(list((trainer.run / "snapshots").glob("*"))),
            **opened,
        }
        opened.clear()
        with Path(NOTES).open("a") as file:
            file.write(json.dumps(facts) + "\n")

    Trainer.save_snapshot = save_snapshot  # type: ignore[method-assign]


def endure(macro_batches: int, folder: Path) -> None:
    """Trains this many macro-batches and compares the quarters of the run; prints what a macro-batch takes in each."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    victim(folder, LONG)
    words = ("train", "victim.py", "--run-dir", "run", "--training.macro-batches", str(macro_batches))
    code = finish(start(folder, *words, hook=functools.partial(watch)), seconds=3600)
    assert code == 0, output(folder)
    notes = [json.loads(line) for line in (folder / NOTES).read_text().splitlines()]
    assert len(notes) >= macro_batches
    size = len(notes) // 4
    first, second, last = notes[:size], notes[size : 2 * size], notes[-size:]
    took = [(part[-1]["seconds"] - part[0]["seconds"]) / (size - 1) for part in (first, last)]
    each = " and ".join(f"{1000 * seconds:.1f} ms" for seconds in took)
    most = " and ".join(f"{max(note['memory'] for note in part) / 2**20:.0f} MiB" for part in (first, last))
    print(f"first and last quarter of {macro_batches:,} macro-batches: {each} each, at most {most}", flush=True)
    for name in ("descriptors", "threads", "files"):
        # A snapshot that is being written holds a few more for a moment.
        assert statistics.median(note[name] for note in last) <= max(note[name] for note in second), name
    assert max(note["snapshots"] for note in notes) <= 4, "two are kept"
    assert max(note["memory"] for note in last) <= max(note["memory"] for note in second) + MARGIN, "memory grows"
    opens = [sum(note["opened"] for note in part) for part in (second, last)]
    assert opens[1] <= opens[0] + size // 10, f"files opened in two quarters: {opens}"
    assert not any(note.get("metrics read") for note in notes[1:]), "metrics.jsonl is read again"
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == macro_batches


LONG = EXPERIMENT.replace("tracking=TrackingConfig(", "tracking=TrackingConfig(progress=False, ")


@fault("trained for 120 macro-batches: memory, files and reads stay flat", short=1, long=1, slow=True)
def short_run(seed: int, folder: Path) -> None:
    endure(120, folder)


@fault("trained for 10,000 macro-batches: memory, files and reads stay flat", short=0, long=1)
def long_run(seed: int, folder: Path) -> None:
    endure(10_000, folder)
