"""Next-token prediction is PyTorch's cross-entropy, summed over targets in nats and float32."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import ModelConfig
from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import OBJECTIVES, NextToken

VOCABULARY = 10


class ConstantLogits(LanguageModel):
    """Has the logits it was given at every position, as its only parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(ModelConfig(vocab_size=len(logits), max_seq_len=64))
        self.logits = nn.Parameter(logits)

    def features(self, tokens: Tensor) -> Tensor:
        return torch.ones(*tokens.shape, 1)

    def to_logits(self, features: Tensor) -> Tensor:
        return features.to(self.logits.dtype) * self.logits

    def head_parameters(self) -> list[Tensor]:
        return [self.logits]


def batch(targets: Tensor) -> Batch:
    return Batch({"tokens": torch.zeros_like(targets)}, targets)


def loss(model: LanguageModel, targets: Tensor, **fields: float) -> Tensor:
    return NextToken(**fields)(model, batch(targets)).total


def targets_with_gaps() -> Tensor:
    targets = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    targets[0, 1:3] = IGNORED
    return targets


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary_per_target() -> None:
    assert loss(ConstantLogits(torch.zeros(64)), torch.randint(64, (3, 5))).item() == pytest.approx(15 * math.log(64))


def test_each_target_costs_its_negative_log_probability() -> None:
    model = ConstantLogits(torch.tensor([0.5, 0.25, 0.25]).log())
    targets = torch.tensor([[0, 1, 2, 0, 0]]).expand(3, 5)
    assert loss(model, targets).item() == pytest.approx(3 * (3 * math.log(2) + 2 * math.log(4)))


def test_ignored_targets_cost_nothing_and_are_not_counted() -> None:
    targets = torch.full((3, 5), IGNORED)
    model = ConstantLogits(torch.zeros(VOCABULARY))
    assert loss(model, targets).item() == 0 and NextToken().count(batch(targets)) == 0
    targets[1, 2] = 4
    assert loss(model, targets).item() == pytest.approx(math.log(VOCABULARY))
    assert NextToken().count(batch(targets)) == 1


@pytest.mark.parametrize("fields", [{}, {"z_loss": 1e-4}, {"label_smoothing": 0.1}])
def test_half_precision_logits_are_summed_in_float32(fields: dict[str, float]) -> None:
    logits = torch.randn(1000, dtype=torch.bfloat16)
    model, targets = ConstantLogits(logits), torch.zeros(64, 64, dtype=torch.int64)
    total = loss(model, targets, **fields)
    assert total.dtype == torch.float32
    if not fields:
        assert total.item() == pytest.approx(-4096 * logits.float().log_softmax(0)[0].item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_pytorch(smoothing: float, chunk: int | None) -> None:
    """With the gradient."""
    logits, targets = torch.randn(VOCABULARY), targets_with_gaps()
    expected = logits.clone().requires_grad_()
    flat = expected.expand(15, VOCABULARY)
    reference = F.cross_entropy(
        flat, targets.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    reference.backward()
    model = ConstantLogits(logits)
    model.loss_chunk = chunk
    total = loss(model, targets, label_smoothing=smoothing)
    total.backward()
    torch.testing.assert_close(total, reference)
    torch.testing.assert_close(model.logits.grad, expected.grad)


def test_a_z_loss_adds_the_square_of_log_z_at_every_target() -> None:
    """Logits of 2 for each of 10 tokens: log Z is 2 + log 10, whatever the target."""
    targets = targets_with_gaps()
    model = ConstantLogits(torch.full((VOCABULARY,), 2.0))
    added = loss(model, targets, z_loss=0.01) - loss(model, targets)
    assert added.item() == pytest.approx(13 * 0.01 * (2 + math.log(10)) ** 2, rel=1e-4)


def test_a_z_loss_pulls_log_z_to_zero() -> None:
    """Each of 10 tokens is a target equally often, so cross-entropy alone would leave log Z where it is."""
    model, targets = ConstantLogits(torch.full((VOCABULARY,), 3.0)), torch.arange(10).view(2, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(100):
        loss(model, targets, z_loss=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(model.logits.logsumexp(-1).item()) < 0.01


def test_both_regularizers_add_up() -> None:
    model, targets = ConstantLogits(torch.randn(VOCABULARY)), targets_with_gaps()
    smoothed, both = (loss(model, targets, label_smoothing=0.2, z_loss=z_loss) for z_loss in (0.0, 0.01))
    log_z = model.logits.logsumexp(-1)
    torch.testing.assert_close(both, smoothed + 13 * 0.01 * log_z**2)


@torch.no_grad()
def test_validation_has_no_regularizers() -> None:
    model, targets = ConstantLogits(torch.randn(VOCABULARY)), targets_with_gaps()
    assert torch.equal(loss(model, targets, z_loss=0.1, label_smoothing=0.1), loss(model, targets))


def test_with_a_regularizer_the_plain_cross_entropy_is_a_metric() -> None:
    model, targets = ConstantLogits(torch.randn(VOCABULARY)), targets_with_gaps()
    metrics = NextToken(z_loss=0.1, label_smoothing=0.1)(model, batch(targets)).metrics
    torch.testing.assert_close(metrics["cross_entropy"], loss(model, targets).detach())
    assert not metrics["cross_entropy"].requires_grad
    assert NextToken()(model, batch(targets)).metrics == {}


def test_other_inputs_of_the_model_come_from_the_batch() -> None:
    class Shifted(ConstantLogits):
        inputs = frozenset({"shift"})

        def features(self, tokens: Tensor, *, shift: Tensor) -> Tensor:
            return shift[..., None]

    model, targets = Shifted(torch.tensor([1.0, 0.0])), torch.zeros(1, 2, dtype=torch.int64)
    inputs = {"tokens": targets, "shift": torch.tensor([[0.0, 3.0]])}
    total = NextToken()(model, Batch(inputs, targets)).total
    assert total.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-3)))


def test_it_is_registered_by_its_name_and_configured_by_its_fields() -> None:
    assert OBJECTIVES["next_token"] is NextToken
    objective: Any = NextToken(z_loss=1e-4)
    assert dataclasses.asdict(objective) == {"z_loss": 1e-4, "label_smoothing": 0.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.z_loss = 0.0
