"""A tiny experiment that every room can train in a second or two."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from cleangpt.checkpoints.run_folder import open_run
from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora import CORPORA, prepare
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.build import build_trainer
from cleangpt.training.launch import resolve
from cleangpt.training.trainer import Trainer

settings.register_profile("default", deadline=None)
settings.load_profile("default")
# Models this small are faster on one thread, and the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests of it would do nothing


def change(experiment: Experiment, **fields: Any) -> Experiment:
    """A copy with fields such as ``training__macro_batches=3`` changed."""
    for name, value in fields.items():
        part, _, entry = name.partition("__")
        if entry:
            value = dataclasses.replace(getattr(experiment, part), **{entry: value})
        experiment = dataclasses.replace(experiment, **{part: value})
    return experiment


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forgets what a test compiled: PyTorch gives up on a function that all tests together compile too many times."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(workplace: Path) -> Callable[..., Experiment]:
    """Builds a two-digit adder experiment of 6 macro-batches of 4 batches of 8, with fields changed."""
    corpus = CORPORA["adder"](digits=2, train_samples=90, val_samples=40, test_samples=30)

    def build(**fields: Any) -> Experiment:
        seq_len = corpus.row_length - 1
        experiment = Experiment(
            name="tiny",
            corpus=corpus,
            data=DataConfig(seq_len=seq_len, batch_size=8),
            model=GPTConfig(max_seq_len=seq_len, n_layers=2, n_heads=2, dim=16, dropout=0.1),
            optimizer=OptimizerConfig(lr=1e-2),
            schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.1, warmup=0.1)),
            training=TrainingConfig(macro_batches=6, batches_per_macro_batch=4, device="cpu"),
            saving=SavingConfig(keep_best=2),
            tracking=TrackingConfig(progress=False, sample_tokens=4, score_samples=10),
        )
        return change(experiment, **fields)

    return build


@pytest.fixture
def trainer() -> Callable[..., Trainer]:
    """Opens a trainer for an experiment: prepares its corpus, opens its run."""

    def build(experiment: Experiment) -> Trainer:
        store = prepare(experiment.corpus, Path(experiment.data.folder))
        experiment = resolve(experiment, store.vocab_size)
        run = open_run(experiment, None, [])
        return build_trainer(experiment, run, store, ProgressBar(run, progress=False))

    return build
