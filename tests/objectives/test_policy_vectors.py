"""Losses and gradients are TRL's, as `policy_vectors.py` has computed and stored them."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.policy import PolicyObjective, Round
from cleangpt.objectives.ppo import PPO
from cleangpt.objectives.rloo import RLOO
from tests.objectives.policies import loss_and_gradients
from tests.objectives.policy_vectors import FILE, LONGEST

STORED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
INPUTS = {name: torch.tensor(values) for name, values in STORED["inputs"].items()}
MASK = INPUTS["mask"].bool()
CASES: dict[str, PolicyObjective] = {
    "grpo": GRPO(),
    "dapo": GRPO(norm="token", clip_high=0.28),
    "dr_grpo": GRPO(norm="constant", constant_length=LONGEST),
    "gspo": GRPO(ratio="sequence", clip_low=0.03, clip_high=0.04),
    "grpo_kl": GRPO(kl_coef=0.1),
    "rloo": RLOO(),
    "ppo": PPO(),
}


def batch(advantages: Tensor) -> Batch:
    extras = {
        "advantages": advantages.expand(MASK.shape), "old_logprobs": INPUTS["old"], "old_values": INPUTS["old_values"],
        "reference_logprobs": INPUTS["reference"], "returns": INPUTS["returns"], "fresh": torch.zeros(len(MASK)),
    }  # fmt: skip
    return Batch({"tokens": torch.zeros(MASK.shape, dtype=torch.int64)}, torch.where(MASK, 0, IGNORED), extras)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradient_are_those_of_trl(name: str) -> None:
    """Of PPO, those of 0.11.4."""
    theirs, advantages = STORED["cases"][name], INPUTS["advantages"][:, None]
    scores = {"logprobs": INPUTS["logprobs"]}
    if name == "ppo":
        advantages, scores = INPUTS["token_advantages"], {**scores, "value": INPUTS["values"]}
    loss, gradients = loss_and_gradients(CASES[name], batch(advantages), scores)
    assert loss == pytest.approx(theirs["loss"], rel=1e-6, abs=3e-7)  # float32, a sum that almost cancels
    torch.testing.assert_close(gradients["logprobs"], torch.tensor(theirs["gradient"]), rtol=1e-6, atol=1e-7)
    if name == "ppo":
        torch.testing.assert_close(gradients["value"], torch.tensor(theirs["value_gradient"]), rtol=1e-6, atol=1e-7)


def test_ppo_s_rewards_advantages_and_returns_are_those_of_trl() -> None:
    """With the KL term at every token and the reward at the last."""
    last = MASK.sum(dim=1) - 1
    rewards = torch.zeros(MASK.shape, dtype=torch.float64)
    rewards[torch.arange(len(MASK)), last] = INPUTS["rewards"].double()
    old, reference, values = (INPUTS[name].double() * MASK for name in ("old", "reference", "values"))
    rollouts = Round(MASK, rewards, old, 1, reference=reference, values=values, kl_coef=0.1)
    ours, theirs = PPO(gamma=0.95, lam=0.9).estimate(rollouts), STORED["cases"]["ppo_advantages"]
    for name in ("advantages", "returns"):
        expected = torch.tensor(theirs[name], dtype=torch.float64)
        torch.testing.assert_close(ours[name][MASK], expected[MASK], rtol=1e-5, atol=1e-6)
