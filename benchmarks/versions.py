"""This version against an older checkout of CleanGPT, both as whole processes of the same command lines, in turn.

    python -m benchmarks.versions --before CHECKOUT

It times what a user waits for: the start to the end of the first step, a step (by the run's own metrics), a step whose
loss is computed in chunks and its memory, a run that saves a snapshot after every step, and a resume.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
        self.environment = os.environ | {"PYTHONPATH": str(checkout)}
        self.numbers = itertools.count(1)
        folder.mkdir()

    def call(self, module: str, *words: str) -> float:
        """Runs `python -m module words`; returns the seconds it took."""
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", module, *words], cwd=self.folder, env=self.environment,
                              capture_output=True, text=True)  # fmt: skip
        taken = time.perf_counter() - began
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
        """Seconds from the start of a new run to the end of its first step."""
        return self.call("benchmarks.first_step", *CHAR, "--run-dir", f"runs/{next(self.numbers)}")

    def resumed(self, run: str) -> float:
        """Seconds from the start of a resume to the end of its first step."""
        return self.call("benchmarks.first_step", "resume", run, "--training.macro-batches", "9")


def measures(version: Version) -> dict[str, Callable[[], float]]:
    """The measurements of a version by name; smaller is better."""
    kept = version.run(*PAIRS, "--training.macro-batches", "1", "--training.batches-per-macro-batch", "1")
    chunks = (*PAIRS, *SHORT, "4", "--training.loss-chunk", "128")
    length = ("--training.macro-batches", "10", "--training.batches-per-macro-batch", "1")
    saves = (*PAIRS, *length, "--saving.keep-best", "1", "--saving.no-async-snapshots")
    return {
        "start to the first step, s": version.first_step,
        "a step of 4 x 128, s": lambda: version.metric("step_time", *CHAR, *SHORT, "60"),
        "a step of 12 million parameters, loss in chunks, s": lambda: version.metric("step_time", *chunks),
        "its memory, bytes": lambda: version.metric("peak_memory", *chunks),
        "a run with ten snapshots of 12 million parameters, s": lambda: version.call(
            "cleangpt", *saves, "--run-dir", f"runs/{next(version.numbers)}"
        ),
        "resume to the first step, 12 million parameters, s": lambda: version.resumed(kept),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints the median ratio of each measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older version")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        before = measures(Version(options.before.resolve(), Path(name) / "before"))
        after = measures(Version(PROJECT, Path(name) / "after"))
        for what in after:
            pairs = [(after[what](), before[what]()) for _ in range(options.rounds)]
            ratios = [now / then for now, then in pairs]
            now, then = (statistics.median(side) for side in zip(*pairs, strict=True))
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{what:55} {now:12.4g} {then:12.4g}  ratio {statistics.median(ratios):.3f}  ({spread})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
