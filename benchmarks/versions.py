"""This version against an older checkout of CleanGPT, both as whole processes of the same command lines, in turn.

    python -m benchmarks.versions --before CHECKOUT
    python -m benchmarks.versions --before CHECKOUT --rounds 15 start snapshot resume

`start` is everything up to the end of the first step, `resume` the same of a run that goes on, `snapshot` a run that
saves one after every step: in CPU time, user and system together, which other work on the machine disturbs less than
it does the clock. `step`, `chunks` and `memory` are metrics of a run: a step, a step whose loss is computed in chunks,
and its memory. All processes have one thread.
"""

import argparse
import compileall
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]
QUIET = ("--tracking.sample-tokens", "0", "--tracking.score-samples", "0", "--data.val-samples", "64")
CHAR = ("train", "stdlib_demo", "--corpus.max-bytes", "1000000", *QUIET)
PAIRS = (
    "train",
    "stdlib_code",
    "--corpus.max-bytes",
    "1000000",
    "--data.batch-size",
    "2",
    "--training.accumulation",
    "1",
    *QUIET,
)
SHORT = ("--training.macro-batches", "3", "--training.batches-per-macro-batch")


class Version:
    """A checkout, its command line, and a folder for its runs."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self.numbers = itertools.count(1)
        folder.mkdir()
        for package in ("cleangpt", "benchmarks"):  # else each process compiles what has changed since its last import
            compileall.compile_dir(checkout / package, quiet=1)

    def call(self, module: str, *words: str) -> float:
        """Runs `python -m module words`; returns the seconds of CPU time it took."""
        before = cpu_time_of_children()
        done = subprocess.run([sys.executable, "-m", module, *words], cwd=self.folder, env=self.environment,
                              capture_output=True, text=True)  # fmt: skip
        taken = cpu_time_of_children() - before
        if done.returncode:
            raise SystemExit(f"{module} {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return taken

    def run(self, *words: str) -> str:
        """A fresh folder for a run, trained by `cleangpt words`; its path."""
        name = f"runs/{next(self.numbers)}"
        self.call("cleangpt", *words, "--run-dir", name)
        return name

    def metric(self, name: str, *words: str) -> float:
        """A metric of the last macro-batch of a run."""
        lines = (self.folder / self.run(*words) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return float(json.loads(lines[-1])[name])

    def first_step(self) -> float:
        """CPU time from the start of a new run to the end of its first step."""
        return self.call("benchmarks.first_step", *CHAR, "--run-dir", f"runs/{next(self.numbers)}")

    @functools.cached_property
    def kept(self) -> str:
        """A run of 12 million parameters, to be resumed."""
        return self.run(*PAIRS, "--training.macro-batches", "1", "--training.batches-per-macro-batch", "1")

    def resumed(self) -> float:
        """CPU time from the start of a resume to the end of its first step."""
        return self.call("benchmarks.first_step", "resume", self.kept, "--training.macro-batches", "9")


def cpu_time_of_children() -> float:
    """Seconds, user and system, of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CHUNKS = (*PAIRS, *SHORT, "4", "--training.loss-chunk", "128")
TEN = ("--training.macro-batches", "10", "--training.batches-per-macro-batch", "1")
SAVES = (*PAIRS, *TEN, "--saving.keep-best", "1", "--saving.no-async-snapshots")
ROWS: dict[str, tuple[str, Callable[[Version], float]]] = {
    "start": ("start to the first step, s of CPU time", Version.first_step),
    "snapshot": (
        "a run with ten snapshots of 12 million parameters, s of CPU time",
        lambda version: version.call("cleangpt", *SAVES, "--run-dir", f"runs/{next(version.numbers)}"),
    ),
    "resume": ("resume to the first step, 12 million parameters, s of CPU time", Version.resumed),
    "step": ("a step of 4 x 128, s", lambda version: version.metric("step_time", *CHAR, *SHORT, "60")),
    "chunks": (
        "a step of 12 million parameters, loss in chunks, s", lambda version: version.metric("step_time", *CHUNKS)
    ),
    "memory": ("its memory, bytes", lambda version: version.metric("peak_memory", *CHUNKS)),
}  # fmt: skip
"""What is measured, by name; smaller is better."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints the median ratio of each row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older version")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions, after one that warms up")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all by default")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - ROWS.keys():
        parser.error(f"no row {min(unknown)}; allowed: {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        before, after = (
            Version(checkout, Path(name) / which)
            for checkout, which in ((options.before.resolve(), "before"), (PROJECT, "after"))
        )
        for row in options.rows or ROWS:
            what, measure = ROWS[row]
            pairs = [(measure(after), measure(before)) for _ in range(options.rounds + 1)][1:]
            ratios = [now / then for now, then in pairs]
            now, then = (statistics.median(side) for side in zip(*pairs, strict=True))
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{what:65} {now:12.4g} {then:12.4g}  ratio {statistics.median(ratios):.3f}  ({spread})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
