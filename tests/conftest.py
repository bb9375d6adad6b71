"""A tiny experiment that trains in a second or two, and the table of the slowest tests."""

import dataclasses
import os
import re
import signal
import sys
from collections import Counter
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

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
# Models this small are faster on one thread, and the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests of it would do nothing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slowest", metavar="FILE", help="write the twenty slowest tests into a table of this document")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``default(n)``, all after the first n are slow; slow tests come first.

    So no process is left alone with a slow one at the end.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if (default := item.get_closest_marker("default")) and not item.get_closest_marker("torture"):
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > default.args[0]:
                item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Replaces the rows of the table of the slowest tests in a document, where `--slowest` names one."""
    if not (name := config.getoption("slowest")):
        return
    seconds: Counter[str] = Counter()
    suites: dict[str, str] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid] += report.duration
            suites[report.nodeid] = "slow" if "slow" in report.keywords else "default"
    rows = (f"| `{test.replace('|', '/')}` | {took:.0f} | {suites[test]} |\n" for test, took in seconds.most_common(20))
    document, head = Path(name), "| test | seconds | suite |\n|---|---:|---|\n"
    before, rest = document.read_text(encoding="utf-8").split(head)
    document.write_text(before + head + "".join(rows) + re.sub(r"\A(\|.*\n)*", "", rest), encoding="utf-8")


def change(experiment: Experiment, **fields: Any) -> Experiment:
    """A copy with fields such as ``training__macro_batches=3`` changed."""
    for name, value in fields.items():
        part, _, entry = name.partition("__")
        if entry:
            value = dataclasses.replace(getattr(experiment, part), **{entry: value})
        experiment = dataclasses.replace(experiment, **{part: value})
    return experiment


def stop_after(trainer: Trainer, steps: int) -> None:
    """Asks the trainer to stop after this many of its steps."""
    step, until = trainer.step, trainer.position.step + steps

    def counted() -> None:
        step()
        if trainer.position.step >= until:
            signal.raise_signal(signal.SIGTERM)

    trainer.step = counted  # type: ignore[method-assign]


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
