"""The loss is the summed surprise at every target that counts, in nats and in float32."""

import math

import pytest
import torch
from torch import nn

from cleangpt.data.batch import IGNORED
from cleangpt.objectives import OBJECTIVES, Objective
from cleangpt.objectives.next_token import next_token, next_token_z


class Says(nn.Module):
    """Gives the logits it was made with, whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


TOKENS = torch.zeros(3, 5, dtype=torch.int64)


def test_a_guess_costs_the_logarithm_of_the_vocabulary_for_each_target() -> None:
    loss = next_token(Says(torch.zeros(64)), TOKENS, torch.randint(64, (3, 5)))
    assert loss.item() == pytest.approx(15 * math.log(64))


def test_each_target_costs_its_negative_log_probability() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    targets = torch.tensor([[0, 1, 2, 0, 0]]).expand(3, 5)
    loss = next_token(Says(probabilities.log()), TOKENS, targets)
    assert loss.item() == pytest.approx(3 * (3 * math.log(2) + 2 * math.log(4)))


def test_ignored_targets_cost_nothing_and_all_ignored_is_zero() -> None:
    targets = torch.full((3, 5), IGNORED)
    model = Says(torch.zeros(10))
    assert next_token(model, TOKENS, targets).item() == 0
    targets[1, 2] = 4
    assert next_token(model, TOKENS, targets).item() == pytest.approx(math.log(10))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1000, dtype=torch.bfloat16)
    loss = next_token(Says(logits), torch.zeros(64, 64, dtype=torch.int64), torch.zeros(64, 64, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-4096 * logits.float().log_softmax(0)[0].item(), rel=1e-5)


def test_a_z_loss_adds_the_square_of_log_z_at_every_target_that_counts() -> None:
    """Logits of 2 for each of 10 tokens: log Z is 2 + log 10, whatever the target."""
    targets = torch.zeros(3, 5, dtype=torch.int64)
    targets[0] = IGNORED
    model = Says(torch.full((10,), 2.0))
    added = next_token_z(model, TOKENS, targets, coefficient=0.01) - next_token(model, TOKENS, targets)
    assert added.item() == pytest.approx(10 * 0.01 * (2 + math.log(10)) ** 2, rel=1e-4)


def test_a_z_loss_draws_log_z_to_zero() -> None:
    """Each of 10 tokens is as often a target, so the cross-entropy alone would leave log Z where it is."""
    model, targets = nn.Embedding(1, 10), torch.arange(10).view(2, 5)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(100):
        next_token_z(model, TOKENS[:2], targets, coefficient=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(model.weight.logsumexp(-1).item()) < 0.01


@torch.no_grad()
def test_validation_has_no_z_loss() -> None:
    model, targets = Says(torch.randn(10)), torch.randint(10, (3, 5))
    assert torch.equal(next_token_z(model, TOKENS, targets), next_token(model, TOKENS, targets))


def test_half_precision_logits_have_a_z_loss_in_float32() -> None:
    model, targets = Says(torch.randn(10, dtype=torch.bfloat16)), torch.randint(10, (3, 5))
    assert next_token_z(model, TOKENS, targets).dtype == torch.float32


@pytest.mark.parametrize("objective", [next_token, next_token_z])
def test_it_is_the_objective_of_its_name(objective: Objective) -> None:
    assert OBJECTIVES[objective.__name__] is objective
