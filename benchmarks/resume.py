"""From the start of the process to the end of the first step: a run resumed from its snapshot against a new one.

Both are the real commands, `cleangpt resume` and `cleangpt train`, on a corpus that is prepared; the resumed run reads
its snapshot and verifies the checksums.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.runner import Row, Setup, interleave
from cleangpt.checkpoints.checkpoint import WEIGHTS, best_checkpoint

PROJECT = Path(__file__).parents[1]
EXPERIMENT = """\
from cleangpt.config import DataConfig, OptimizerConfig, TrackingConfig, TrainingConfig
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.gpt import GPTConfig

corpus = Adder(digits=2, train_samples=500, val_samples=100, test_samples=10)
experiment = Experiment(
    name="resume",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=12, folder={folder!r}),
    model=GPTConfig(max_seq_len=corpus.row_length - 1, n_layers={layers}, n_heads=4, dim={dim}),
    optimizer=OptimizerConfig(lr=1e-4),
    training=TrainingConfig(macro_batches=1, batches_per_macro_batch=2, device="cpu"),
    tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
)
"""


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    rows = []
    for layers, dim in [(2, 32)] if setup.quick else [(4, 128), (10, 512)]:
        rows.append(compare(layers, dim, setup.folder.resolve() / f"{layers}x{dim}", setup))
    return rows


def compare(layers: int, dim: int, folder: Path, setup: Setup) -> Row:
    """The row of a model of `layers` x `dim`."""
    folder.mkdir()
    file, resumed = folder / "experiment.py", folder / "resumed"
    file.write_text(EXPERIMENT.format(folder=str(folder / "data"), layers=layers, dim=dim), encoding="utf-8")
    call("cleangpt", "train", str(file), "--run-dir", str(resumed))
    numbers = itertools.count(1)
    # The run was finished, so it is made longer to have a step to take. These processes end before saving anything.
    resume = ("resume", str(resumed), "--training.macro-batches", "2")
    taken = interleave(
        {
            "resumed": lambda: call("benchmarks.first_step", *resume),
            "new": lambda: call(
                "benchmarks.first_step", "train", str(file), "--run-dir", str(folder / f"new{next(numbers)}")
            ),
        },
        min(5, setup.repetitions),
        warm_up=not setup.quick,
    )
    weights = load_file(best_checkpoint(resumed) / WEIGHTS)
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Row(f"{parameters:,} parameters: to the first step", "s", taken["resumed"], "a new run", taken["new"])


def call(module: str, *words: str) -> float:
    """Runs `python -m module words`, as `checked` does."""
    return checked([sys.executable, "-m", module, *words], PROJECT)


def checked(command: Sequence[str], folder: Path) -> float:
    """Runs a command in a folder to its end; returns the seconds from its start.

    Raises:
        RuntimeError: it failed; includes its output.
    """
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    taken = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stdout}{process.stderr}")
    return taken
