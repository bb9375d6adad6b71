"""The loss is the summed surprise at every target that counts, in nats and in float32."""

import math

import pytest
import torch
from torch import nn

from cleangpt.data.batches import IGNORED
from cleangpt.objectives import OBJECTIVES
from cleangpt.objectives.next_token import next_token


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


def test_it_is_the_objective_of_its_name() -> None:
    assert OBJECTIVES["next_token"] is next_token
