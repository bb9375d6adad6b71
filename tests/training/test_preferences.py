"""Training on preferences by every objective: the same whatever the split, and resumed bit for bit."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cleangpt.checkpoints.checkpoint import best_checkpoint, load_checkpoint
from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.commands import main
from cleangpt.config import (
    DataConfig,
    FineTuningConfig,
    LoRAConfig,
    OptimizerConfig,
    SavingConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora import prepare
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.distributed.layout import Layout
from cleangpt.errors import UserError
from cleangpt.evaluation.reference import Reference, add_reference
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.objectives import DPO, IPO, KTO, ORPO, Objective, RewardModel, SimPO
from cleangpt.objectives.pairs import REFERENCE
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.launch import check, train
from tests.conftest import change
from tests.forked import run_together

PAIRS = FablePreferences(train_pairs=40, val_pairs=6)
LABELS = replace(PAIRS, form="labels")
OBJECTIVES: list[Objective] = [
    DPO(beta=0.5), DPO(beta=0.5, sft_weight=1.0), IPO(beta=0.5), KTO(beta=0.5), ORPO(), SimPO(), RewardModel(),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a small model that has seen some openings, outside the tests' own folders."""
    folder = tmp_path_factory.mktemp("base")
    openings = FableOpenings(train_sentences=64, val_sentences=8)
    experiment = Experiment(
        name="base", corpus=openings, data=DataConfig(seq_len=openings.row, batch_size=16, folder=str(folder / "data")),
        model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=2, dim=16), optimizer=OptimizerConfig(lr=1e-2),
        training=TrainingConfig(macro_batches=1, batches_per_macro_batch=8, device="cpu", precision="fp32"),
        tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0), run_dir=str(folder / "run"),
    )  # fmt: skip
    return str(train(experiment))


@pytest.fixture
def build(base: str, workplace: Path) -> Callable[..., Experiment]:
    """Two macro-batches of four steps of eight rows."""

    def built(objective: Objective, **fields: Any) -> Experiment:
        corpus = LABELS if isinstance(objective, KTO) else PAIRS
        experiment = Experiment(
            name="preferred", corpus=corpus, data=DataConfig(seq_len=corpus.row, batch_size=8, prefetch=1),
            model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=2, dim=16), optimizer=OptimizerConfig(lr=1e-3),
            objective=objective, init_from=base, saving=SavingConfig(keep_best=2, keep_snapshots=9),
            training=TrainingConfig(macro_batches=2, batches_per_macro_batch=4, device="cpu", precision="fp32"),
            tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0, every=1),
        )  # fmt: skip
        return change(experiment, **fields)

    return built


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_snapshot(list_snapshots(run / "snapshots")[0])["model"]
    return weights


def assert_close(one: Path, other: Path) -> None:
    first, second = last_weights(one), last_weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=5e-5, rtol=2e-4)


@pytest.mark.default(1)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_run_is_the_same_in_micro_batches_and_learns(build: Callable[..., Experiment], objective: Objective) -> None:
    """And accumulated batches are the same as larger ones."""
    build = partial(build, objective)
    whole = train(build(run_dir="whole"))
    assert_close(whole, train(build(run_dir="parts", training__micro_batch_size=2)))
    first, *_, last = read_metrics(train(build(run_dir="long", training__macro_batches=6, optimizer__lr=1e-2)))
    assert last["train_loss"] < first["train_loss"]
    large = train(build(run_dir="large", data__batch_size=16, training__batches_per_macro_batch=2))
    accumulated = train(build(run_dir="accumulated", training__accumulation=2))
    assert_close(large, accumulated)


@pytest.mark.default(1)
@pytest.mark.parametrize("objective", [DPO(beta=0.5, sft_weight=1.0), KTO(beta=0.5), RewardModel()], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(
    build: Callable[..., Experiment], objective: Objective, base: str
) -> None:
    """Although the model that it started from, its reference, is no longer there."""
    shutil.copytree(base, "start")
    fields = {"training__macro_batches": 3, "init_from": "start"}
    whole = train(build(objective, run_dir="whole", **fields))
    part = train(build(objective, run_dir="part", **fields))
    shutil.rmtree("start")
    for snapshot in list_snapshots(part / "snapshots")[:-1]:
        for path in sorted(snapshot.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        snapshot.rmdir()
    assert main(["resume", str(part)]) == 0
    first, second = last_weights(whole), last_weights(part)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DPO(beta=0.5, sft_weight=1.0), KTO(beta=0.5), RewardModel()], ids=str)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_is_the_same_on_two_processes(
    build: Callable[..., Experiment], objective: Objective, base: str, strategy: str
) -> None:
    alone = train(build(objective, run_dir="alone"))
    Path("several.py").write_text(
        "from pathlib import Path\n"
        "from cleangpt.checkpoints.run_folder import read_experiment\n"
        "experiment = read_experiment(Path('alone'))\n"
    )
    outcome = run_together(2, "train", "several.py", "--run-dir", "both", "--parallel.strategy", strategy)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert_close(alone, Path("both"))


def test_adapters_have_the_model_without_them_as_their_reference(build: Callable[..., Experiment], base: str) -> None:
    """The first step sees no difference from it, and the column is that of the base."""
    tuned = FineTuningConfig(lora=LoRAConfig(rank=2, targets=("blocks.*",)))
    run = train(build(DPO(beta=0.5), run_dir="adapted", fine_tuning=tuned, optimizer__lr=1e-9))
    (first, *_) = read_metrics(run)
    assert first["train_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["train_accuracy"] == pytest.approx(0.5, abs=0.5)
    dataset = prepare(PAIRS, Path("data"), console=Console(quiet=True))
    add_reference(dataset, Reference(base, "fp32", torch.device("cpu")), None)
    assert len(list(Path("data").glob("*.reference-*"))) == 1 and REFERENCE in dataset.columns


def test_a_run_evaluates_with_the_reference_it_was_trained_with(
    build: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(build(DPO(beta=0.5), run_dir="run"))
    assert main(["evaluate", "run", "--json"]) == 0
    best = load_checkpoint(best_checkpoint(run)).facts["val_loss"]
    assert f'"loss": {best:.4f}'[:15] in capsys.readouterr().out


def test_a_head_that_gets_no_gradient_is_frozen_where_gradients_are_reduced(build: Callable[..., Experiment]) -> None:
    """Otherwise the processes would wait for a gradient that never comes."""
    llama = LlamaConfig(vocab_size=509, max_seq_len=32, n_layers=1, n_heads=2, dim=16)
    experiment = build(RewardModel(), model=llama)
    check(experiment)
    with pytest.raises(UserError, match=r"freeze is \(\); allowed with objective RewardModel on several devices"):
        check(experiment, Layout(replicas=2))
    check(build(RewardModel(), model=replace(llama, tied=True)), Layout(replicas=2))
    check(build(RewardModel(), model=llama, fine_tuning=FineTuningConfig(freeze=("head.*",))), Layout(replicas=2))
    check(build(SimPO(), model=llama), Layout(replicas=2))


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (DPO(), {"init_from": None}, "init_from is None; allowed with objective DPO: a model"),
        (DPO(), {"corpus": LABELS}, "DPO compares rows, chosen and rejected; this corpus has answer"),
        (KTO(), {"corpus": PAIRS}, "KTO compares rows, answer and mismatched; this corpus has chosen"),
        (
            RewardModel(), {"corpus": FableOpenings(train_sentences=64, val_sentences=8)},
            "RewardModel compares rows, chosen and rejected; this corpus has none",
        ),
        (SimPO(), {"data__batch_size": 5}, "data.batch_size is 5; allowed: a multiple of 2, so that rows"),
        (SimPO(), {"training__micro_batch_size": 1}, "training.micro_batch_size is 1; allowed: a multiple of 2"),
        (SimPO(), {"data__val_batch_size": 3}, "data.val_batch_size is 3; allowed: a multiple of 2"),
        (SimPO(), {"data__val_samples": 3}, "data.val_samples is 3; allowed: a multiple of 2"),
        (DPO(), {"model__dropout": 0.1}, "model.dropout is 0.1; allowed with objective DPO: 0, as for its reference"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_created(
    build: Callable[..., Experiment], objective: Objective, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(build(objective, run_dir="run", **fields))
    assert not Path("run").exists()
