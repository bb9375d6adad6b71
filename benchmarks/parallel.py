"""Speedup from a second process: a step of `ddp` and `fsdp` on two processes of one thread each.

The same experiment with the same batches runs on one process of two threads, which has the same two cores. The row of
one process with one thread shows what a second core can gain at all. Seconds per step are those that the run records
for its last macro-batch, so neither start-up nor preparation counts; a step has the same tokens everywhere, so tokens
per second have the inverse ratio. On one process there is nothing to communicate and every strategy is the plain
model: `ddp` and `fsdp` on one process are the first row.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.runner import Row, Setup, interleave
from cleangpt.tracking.metrics import read_metrics

PROJECT = Path(__file__).parents[1]
EXPERIMENT = """\
from cleangpt.config import DataConfig, OptimizerConfig, SavingConfig, TrackingConfig, TrainingConfig
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.gpt import GPTConfig

corpus = Adder(digits=6, train_samples=5000, val_samples=20, test_samples=10)
experiment = Experiment(
    name="parallel",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size={batch_size}, folder={folder!r}),
    model=GPTConfig(max_seq_len=corpus.row_length - 1, n_layers={layers}, n_heads=4, dim={dim}),
    optimizer=OptimizerConfig(lr=1e-4),
    training=TrainingConfig(macro_batches=2, batches_per_macro_batch={steps}, device="cpu"),
    saving=SavingConfig(snapshot_every=1000),
    tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
)
"""


@dataclass(frozen=True)
class Cell:
    """Processes, the threads of each, and how they share the work."""

    processes: int
    threads: int
    strategy: str = "ddp"


ONE_PROCESS = "1 process of 2 threads"
CELLS = {
    ONE_PROCESS: Cell(1, 2),
    "1 process of 1 thread": Cell(1, 1),
    "ddp, 2 processes of 1 thread": Cell(2, 1),
    "fsdp, 2 processes of 1 thread": Cell(2, 1, "fsdp"),
}


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    sizes = [(2, 32, 8, 2)] if setup.quick else [(4, 128, 32, 40), (6, 384, 16, 6)]
    return [row for size in sizes for row in compare(*size, setup)]


def compare(layers: int, dim: int, batch_size: int, steps: int, setup: Setup) -> list[Row]:
    """The rows of a model of `layers` x `dim`, over macro-batches of `steps` steps."""
    folder = setup.folder.resolve() / f"{layers}x{dim}"
    folder.mkdir()
    text = EXPERIMENT.format(batch_size=batch_size, folder=str(folder / "data"), layers=layers, dim=dim, steps=steps)
    (folder / "experiment.py").write_text(text, encoding="utf-8")
    numbers = itertools.count(1)
    measures = {name: partial(step_seconds, cell, folder, numbers) for name, cell in CELLS.items()}
    taken = interleave(measures, min(3, setup.repetitions), warm_up=False)
    theirs = taken.pop(ONE_PROCESS)
    return [Row(f"{layers} × {dim}: {name}", "s", ours, ONE_PROCESS, theirs) for name, ours in taken.items()]


def step_seconds(cell: Cell, folder: Path, numbers: "itertools.count[int]") -> float:
    """Trains the experiment of `folder` in a new run; returns the seconds of a step in its last macro-batch.

    Raises:
        RuntimeError: the run failed; includes its output.
    """
    name = folder / f"run{next(numbers)}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cell.processes}"]
    command = [
        sys.executable, *(torchrun if cell.processes > 1 else []), "-m", "cleangpt", "train",
        str(folder / "experiment.py"), "--run-dir", str(name), "--training.threads", str(cell.threads),
        "--parallel.strategy", cell.strategy,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(cell.threads)}
    process = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stdout}{process.stderr}")
    return float(read_metrics(name)[-1]["step_time"])
