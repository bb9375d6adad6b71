"""A run on a mixture: resumes exactly, tells the figures of each source, refuses what would lose the position."""

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cleangpt.cli import main
from cleangpt.config import Experiment, Source
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.mixture import Mixture
from cleangpt.errors import UserError
from cleangpt.evaluation.report import evaluate_run
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.run import check_resumable, summary
from cleangpt.training.trainer import Trainer

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


def stop_after(trainer: Trainer, steps: int) -> None:
    """Raises SIGTERM within the step of that number."""
    original, count = trainer.step, 0

    def step() -> None:
        nonlocal count
        original()
        count += 1
        if count == steps:
            signal.raise_signal(signal.SIGTERM)

    trainer.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("steps", [5, 8, 14])
@pytest.mark.parametrize("weights", [CURRICULUM, (5.0, 3.0, 2.0)], ids=["curriculum", "constant"])
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
    run = trainer(three(tiny, (2.0, 1.0, 1.0)))
    lines = summary(run.experiment, run.run, run.store, run.model, run.device, run.layout)
    run.loader.close()
    assert [line.split(",")[0] for line in lines if "digits" in line] == [
        f"data     digits{digits}: {share} % of the samples"
        for digits, share in ((1, "50.00"), (2, "25.00"), (3, "25.00"))
    ]


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
