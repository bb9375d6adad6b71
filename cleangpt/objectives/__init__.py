"""Objectives by name: one file each; registering is one line here."""

from cleangpt.objectives.base import Loss, Objective
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.next_token import NextToken
from cleangpt.objectives.ppo import PPO
from cleangpt.objectives.reinforce import Reinforce
from cleangpt.objectives.rloo import RLOO

__all__ = ["OBJECTIVES", "Loss", "NextToken", "Objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": GRPO,
    "next_token": NextToken,
    "ppo": PPO,
    "reinforce": Reinforce,
    "rloo": RLOO,
}
