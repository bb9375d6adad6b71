"""The same experiment on the same machine gives the same weights, bit for bit, whatever else may differ."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.config import SavingConfig
from cleangpt.data.batch import Batch
from cleangpt.experiment import Experiment
from cleangpt.training.trainer import Trainer
from tests.conftest import stop_after
from tests.faults._runs import differing
from tests.forked import run_together

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]
STEPS = 24
"""Of the tiny run: six macro-batches of four."""


def final(run: str) -> dict[str, Any]:
    """What training made: weights, moments, position and generators; without times and what is kept for show."""
    state = load_snapshot(list_snapshots(Path(run) / "snapshots")[0])
    del state["meter"], state["position"]["time_trained"], state["checkpoints"], state["trackers"]
    return state


ENDS: list[dict[str, Any]] = []


@pytest.fixture
def undisturbed(tiny: Build, trainer: Open) -> dict[str, Any]:
    """What the tiny run makes, trained once."""
    if not ENDS:
        trainer(tiny(run_dir="one")).train()
        ENDS.append(final("one"))
    return ENDS[0]


def disturb() -> None:
    """Uses every generator of the process, as whatever ran before may have done."""
    torch.rand(7)
    np.random.rand(5)
    random.random()


@pytest.mark.default(1)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data__prefetch": 1},
        {"data__prefetch": 64},
        {"saving": SavingConfig(snapshot_every=5, async_snapshots=False, keep_best=5)},
        {"saving": SavingConfig(keep_snapshots=5, checkpoint_every=1)},
        {"tracking__sample_tokens": 0, "tracking__score_samples": 0},
        {"tracking__tensorboard": True},
    ],
    ids=["again", "one batch ahead", "many ahead", "saved seldom", "saved often", "unobserved", "observed"],
)
def test_what_is_not_training_changes_no_bit_of_it(
    tiny: Build, trainer: Open, undisturbed: dict[str, Any], fields: dict[str, Any]
) -> None:
    disturb()
    trainer(tiny(run_dir="two", **fields)).train()
    assert differing(undisturbed, final("two")) == ""


@pytest.mark.slow
def test_a_batch_that_comes_late_changes_no_bit(tiny: Build, trainer: Open, undisturbed: dict[str, Any]) -> None:
    """The thread that loads ahead is slowed down now and then, so that training waits for it."""
    late = trainer(tiny(run_dir="two", data__prefetch=2))
    read = late.source.stream.batch

    def batch(start: int, count: int) -> Batch:
        time.sleep(0.01 * (start % 3 == 0))
        return read(start, count)

    late.source.stream.batch = batch  # type: ignore[method-assign]
    late.train()
    assert differing(undisturbed, final("two")) == ""


def test_a_run_stopped_after_every_step_ends_with_the_same_bits(
    tiny: Build, trainer: Open, undisturbed: dict[str, Any]
) -> None:
    """In the middle of macro-batches and at their ends; every step but the first follows a resume."""
    status, times = "interrupted", 0
    while status == "interrupted":
        broken = trainer(tiny(run_dir="two"))
        stop_after(broken, 1)
        status, times = broken.train(), times + 1
    assert (status, times) == ("finished", STEPS + 1)  # the last one validates
    assert differing(undisturbed, final("two")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [pytest.param("model", marks=pytest.mark.torture), "blocks"])
def test_a_compiled_model_gives_the_same_bits_again_and_when_resumed(tiny: Build, trainer: Open, compiled: str) -> None:
    for run in ("one", "two"):
        trainer(tiny(run_dir=run, training__compile=compiled)).train()
    assert differing(final("one"), final("two")) == ""
    broken = trainer(tiny(run_dir="three", training__compile=compiled))
    stop_after(broken, 10)
    assert broken.train() == "interrupted"
    torch.compiler.reset()  # as in a new process
    trainer(tiny(run_dir="three", training__compile=compiled)).train()
    assert differing(final("one"), final("three")) == ""


EXPERIMENT = """
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="own",
    corpus=Adder(digits=1, train_samples=40, val_samples=16, test_samples=8),
    data=DataConfig(seq_len=6, batch_size=8),
    model=GPTConfig(max_seq_len=6, n_layers=2, n_heads=2, dim=16, dropout=0.1),
    optimizer=OptimizerConfig(lr=1e-2),
    schedule=ScheduleConfig(batch_size=Schedule(shape="linear", initial=0.5)),
    training=TrainingConfig(macro_batches=4, batches_per_macro_batch=6, accumulation=2, device="cpu", threads=1),
    tracking=TrackingConfig(progress=False, sample_tokens=4),
)
"""


def launch(processes: int, *words: str) -> None:
    """Trains own.py, which is written here, in processes of their own."""
    Path("own.py").write_text(EXPERIMENT)
    outcome = run_together(processes, *words)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@pytest.mark.slow
def test_the_order_of_sets_which_differs_between_processes_changes_no_bit(workplace: Path) -> None:
    Path("own.py").write_text(EXPERIMENT)
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "cleangpt", "train", "own.py", "--run-dir", seed]
        subprocess.run(command, check=True, timeout=240, env=os.environ | {"PYTHONHASHSEED": seed})
    assert differing(final("1"), final("2")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.torture), "fsdp"])
def test_two_processes_give_the_same_bits_again_and_when_resumed(workplace: Path, strategy: str) -> None:
    words = ["--parallel.strategy", strategy]
    for run in ("one", "two"):
        launch(2, "train", "own.py", "--run-dir", run, *words)
    assert differing(final("one"), final("two")) == ""
    # The newest snapshot gone, the run goes on from the one before, in which three of four macro-batches are done.
    shutil.rmtree(list_snapshots(Path("two/snapshots"))[0])
    launch(2, "resume", "two")
    assert differing(final("one"), final("two")) == ""
