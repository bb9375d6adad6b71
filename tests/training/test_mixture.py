"""A run on a mixture: resumes exactly, tells the figures of each source, refuses what would lose the position."""

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cleangpt.checkpoints.run_folder import check_resumable
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.commands import main
from cleangpt.config import Source
from cleangpt.corpora import prepare
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.mixture import Mixture
from cleangpt.errors import UserError
from cleangpt.evaluation.evaluate import evaluate_run
from cleangpt.experiment import Experiment
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.summary import summary
from cleangpt.training.trainer import Trainer
from tests import forked
from tests.conftest import stop_after
from tests.forked import Command

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]

SIZES = {1: 60, 2: 90, 3: 120}
CURRICULUM = (((0.0, 3.0), (1.0, 0.0)), 1.0, ((0.0, 0.0), (1.0, 3.0)))
TIMES = {"tokens_per_second", "step_time", "data_wait_share", "time_trained", "peak_memory", "mfu"}


def three(tiny: Build, weights: tuple[Any, ...] = CURRICULUM, **fields: Any) -> Experiment:
    """Additions of 1, 2 and 3 digits, padded to the longest."""
    sources = tuple(
        Source(
            name=f"digits{digits}",
            corpus=Adder(digits=digits, train_samples=size, val_samples=20, test_samples=10),
            weight=weight,
        )
        for (digits, size), weight in zip(SIZES.items(), weights, strict=True)
    )
    seq_len = Adder(digits=3).row_length - 1
    return tiny(
        **{"corpus": Mixture(sources=sources), "data__seq_len": seq_len, "model__max_seq_len": seq_len, **fields}
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 8, 14])
@pytest.mark.parametrize(
    "weights", [CURRICULUM, pytest.param((5.0, 3.0, 2.0), marks=pytest.mark.slow)], ids=["curriculum", "constant"]
)
def test_a_mixture_of_three_stores_resumes_bit_for_bit(
    tiny: Build, trainer: Open, steps: int, weights: tuple[Any, ...]
) -> None:
    """Within a macro-batch and at the end of one."""
    whole = trainer(three(tiny, weights, run_dir="whole"))
    assert whole.train() == "finished"
    first = trainer(three(tiny, weights, run_dir="cut"))
    stop_after(first, steps)
    assert first.train() == "interrupted"
    second = trainer(three(tiny, weights, run_dir="cut"))
    assert second.train() == "finished"
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    one, two = (
        [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run.run)]
        for run in (whole, second)
    )
    assert one == two


def test_the_figures_of_each_source_are_told(tiny: Build, trainer: Open) -> None:
    run = trainer(three(tiny, (2.0, 1.0, 1.0)))
    run.train()
    last = read_metrics(run.run)[-1]
    samples = {"digits1": 96, "digits2": 48, "digits3": 48}
    for (name, count), size in zip(samples.items(), SIZES.values(), strict=True):
        assert last[f"times_visited/{name}"] == pytest.approx(count / size)
        assert last[f"visited_share/{name}"] == pytest.approx(min(1.0, count / size))
        assert 0 <= last[f"exact_match/{name}"] <= 1
    losses = [last[f"val_loss/{name}"] for name in samples]
    assert last["val_loss"] == pytest.approx(losses[0] / 2 + losses[1] / 4 + losses[2] / 4)
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))


def test_the_summary_says_each_source_s_share_of_the_run(tiny: Build, trainer: Open) -> None:
    experiment = three(tiny, (2.0, 1.0, 1.0))
    run = trainer(experiment)
    store = prepare(experiment.corpus, Path(experiment.data.folder))
    lines = summary(experiment, run.run, store, run.model, run.device, run.layout)
    run.source.close()
    assert [line.split(",")[0] for line in lines if "digits" in line] == [
        f"data     digits{digits}: {share} % of the samples"
        for digits, share in ((1, "50.00"), (2, "25.00"), (3, "25.00"))
    ]


@pytest.mark.slow
def test_a_mixture_is_evaluated_by_source(tiny: Build, trainer: Open) -> None:
    run = trainer(three(tiny, (2.0, 1.0, 1.0)))
    run.train()
    figures = evaluate_run(run.run, None, None, torch.device("cpu"))
    assert figures["split"] == "test" and figures["samples"] == 30
    weighted = figures["loss/digits1"] / 2 + figures["loss/digits2"] / 4 + figures["loss/digits3"] / 4
    assert figures["loss"] == pytest.approx(weighted)
    assert {"exact_match/digits1", "exact_match/digits2", "exact_match/digits3"} <= figures.keys()
    assert main(["report", str(run.run)]) == 0


def test_the_length_of_a_run_whose_weights_change_cannot_change(tiny: Build) -> None:
    check_resumable(three(tiny, (1.0, 1.0, 1.0)), three(tiny, (1.0, 1.0, 1.0), training__macro_batches=9))
    with pytest.raises(UserError, match=r"training.macro_batches is 6 in this run and cannot change"):
        check_resumable(three(tiny), three(tiny, training__macro_batches=9))


def test_the_weights_of_a_run_cannot_change(tiny: Build) -> None:
    with pytest.raises(UserError, match=r"corpus.sources.2.weight is 1.0 in this run and cannot become 2.0"):
        check_resumable(three(tiny, (1.0, 1.0, 1.0)), three(tiny, (1.0, 1.0, 2.0)))


KILLED = """
import hashlib
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.mixture import Mixture
from cleangpt.data.loader import DatasetSource
from cleangpt.models.gpt import GPTConfig

load = DatasetSource.next

def logged(self):
    position, batch = self.samples, load(self)
    with open("samples_" + LOG, "a") as file:
        print(position, hashlib.sha256(batch.inputs["tokens"].numpy().tobytes()).hexdigest(), file=file)
    return batch

DatasetSource.next = logged
sources = tuple(
    Source(name=f"digits{digits}", weight=weight, max_epochs=epochs,
           corpus=Adder(digits=digits, train_samples=size, val_samples=20, test_samples=10))
    for digits, size, weight, epochs in (
        (1, 60, ((0.0, 3.0), (1.0, 0.0)), None), (2, 90, 1.0, 5), (3, 200, ((0.0, 0.0), (1.0, 3.0)), None)
    )
)
experiment = Experiment(
    name="killed",
    corpus=Mixture(sources=sources),
    data=DataConfig(seq_len=12, batch_size=16),
    model=GPTConfig(max_seq_len=12, n_layers=2, n_heads=2, dim=32, dropout=0.1),
    optimizer=OptimizerConfig(lr=1e-2),
    training=TrainingConfig(macro_batches=30, batches_per_macro_batch=4, device="cpu", threads=1),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(sample_tokens=0, score_samples=4),
)
"""


def sample_log(run: str) -> dict[int, str]:
    """What was seen at each position; a position that came again after a kill must have had the same samples."""
    seen: dict[int, str] = {}
    for line in Path(f"samples_{run}").read_text().splitlines():
        position, digest = line.split()
        assert seen.setdefault(int(position), digest) == digest
    return seen


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_mixture_of_three_stores_killed_at_any_moment_sees_the_same_samples_and_ends_with_the_same_bits(
    workplace: Path,
) -> None:
    """With weights that change, and a source that ends on the way."""

    def start(run: str) -> Command:
        (workplace / "killed.py").write_text(KILLED.replace("LOG", repr(run)))
        return forked.start("train", "killed.py", "--run-dir", run)

    def finish(process: Command) -> None:
        assert process.wait() == 0, process.stderr

    finish(start("whole"))
    for steps in (7, 50, 90):
        process = start("broken")
        deadline = time.monotonic() + 60
        while not Path("samples_broken").exists() or len(sample_log("broken")) < steps:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finish(start("broken"))
    assert sample_log("broken") == sample_log("whole") and len(sample_log("whole")) == 120
    assert [
        {name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(Path("broken"))
    ] == [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(Path("whole"))]
    one, two = (
        load_file(list_snapshots(Path(run) / "snapshots")[0] / "shard_00000.safetensors") for run in ("whole", "broken")
    )
    assert one.keys() == two.keys() and any(name.startswith("model/") for name in one)
    assert all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one)
    last = read_metrics(Path("whole"))[-1]
    assert last["times_visited/digits2"] == 5
