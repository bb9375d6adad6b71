"""Objectives by name: one file each; registering is one line here."""

from cleangpt.objectives.base import Loss, Objective
from cleangpt.objectives.dpo import DPO
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.ipo import IPO
from cleangpt.objectives.kto import KTO
from cleangpt.objectives.next_token import NextToken
from cleangpt.objectives.orpo import ORPO
from cleangpt.objectives.ppo import PPO
from cleangpt.objectives.reinforce import Reinforce
from cleangpt.objectives.reinforce_plus_plus import ReinforcePlusPlus
from cleangpt.objectives.reward_model import RewardModel
from cleangpt.objectives.rloo import RLOO
from cleangpt.objectives.simpo import SimPO
from cleangpt.objectives.soft_bins import SoftBins

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "PPO",
    "RLOO",
    "Loss",
    "NextToken",
    "Objective",
    "Reinforce",
    "ReinforcePlusPlus",
    "RewardModel",
    "SimPO",
    "SoftBins",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "dpo": DPO,
    "grpo": GRPO,
    "ipo": IPO,
    "kto": KTO,
    "next_token": NextToken,
    "orpo": ORPO,
    "ppo": PPO,
    "reinforce": Reinforce,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "reward_model": RewardModel,
    "rloo": RLOO,
    "simpo": SimPO,
    "soft_bins": SoftBins,
}
