"""Validation weighs every target the same, and gives whatever metrics an objective has."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from cleangpt.corpora import prepare
from cleangpt.data.batch import Batch
from cleangpt.data.loader import Samples, validation_batches
from cleangpt.evaluation.validate import loss_metrics, validate
from cleangpt.experiment import Experiment
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.objectives import Loss, NextToken, Objective

CPU = torch.device("cpu")


@pytest.fixture
def samples(tiny: Callable[..., Experiment]) -> Samples:
    (source,) = prepare(tiny().corpus, Path("data")).sources
    dataset = source.dataset
    return Samples(dataset.splits["val"], 9)


def gpt(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=13, max_seq_len=9, n_layers=1, n_heads=1, dim=8, dropout=dropout)).train()


def test_every_target_weighs_the_same_whatever_the_batch_size(samples: Samples) -> None:
    model = gpt(dropout=0.5)
    results = [
        validate(model, NextToken(), validation_batches(samples, size), CPU, nullcontext()) for size in (1, 7, 40, 64)
    ]
    assert [result["loss"] for result in results] == pytest.approx([results[0]["loss"]] * 4)
    assert model.training


class Accuracy(Objective):
    """Counts rows, not targets, and has a metric."""

    def count(self, batch: Batch) -> int:
        return len(batch)

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        return Loss(torch.tensor(3.0 * len(batch)), {"accuracy": torch.tensor(0.25 * len(batch))})


def test_the_metrics_of_an_objective_are_divided_by_what_it_counts(samples: Samples) -> None:
    result = validate(gpt(), Accuracy(), validation_batches(samples, 10), CPU, nullcontext())
    assert result == {"loss": 3.0, "accuracy": 0.25}


def test_sums_are_reduced_over_devices_before_they_are_divided(samples: Samples) -> None:
    whole = validate(gpt(), NextToken(), validation_batches(samples, 8), CPU, nullcontext())["loss"]
    parts: list[torch.Tensor] = []
    for rank in range(2):
        batches = validation_batches(samples, 8, rank=rank, world_size=2)
        validate(gpt(), NextToken(), batches, CPU, nullcontext(), reduce=lambda sums: parts.append(sums) or sums)
    both = parts[0] + parts[1]
    result = validate(gpt(), NextToken(), [], CPU, nullcontext(), reduce=lambda sums: both)["loss"]
    assert result == pytest.approx(whole)


def test_a_validation_that_was_stopped_has_no_metrics(samples: Samples) -> None:
    def endless() -> Iterator[Batch]:
        yield from validation_batches(samples, 4)
        raise AssertionError("went on")

    asked = iter([False, False, True])
    result = validate(gpt(), Accuracy(), endless(), CPU, nullcontext(), lambda: next(asked))
    assert all(map(math.isnan, result.values())) and result.keys() == {"loss", "accuracy"}


def test_bits_per_byte_follow_from_the_bytes_of_text() -> None:
    class Facts:
        tokens, text_bytes, masked = 250, 1000, False

    metrics = loss_metrics(2.0, Facts())  # type: ignore[arg-type]
    assert metrics["perplexity"] == pytest.approx(math.e**2)
    assert metrics["bits_per_byte"] == pytest.approx(2.0 * 250 / 1000 / math.log(2))
    Facts.masked = True
    assert loss_metrics(2.0, Facts())["bits_per_byte"] is None  # type: ignore[arg-type]
    Facts.text_bytes, Facts.masked = 0, False
    assert loss_metrics(2.0, Facts())["bits_per_byte"] is None  # type: ignore[arg-type]
    assert loss_metrics(1e6, Facts())["perplexity"] == math.inf  # type: ignore[arg-type]
