"""Objectives by name: one file each; registering is one line here."""

from cleangpt.objectives.base import Loss, Objective
from cleangpt.objectives.dpo import DPO
from cleangpt.objectives.ipo import IPO
from cleangpt.objectives.kto import KTO
from cleangpt.objectives.next_token import NextToken
from cleangpt.objectives.orpo import ORPO
from cleangpt.objectives.reward_model import RewardModel
from cleangpt.objectives.simpo import SimPO

__all__ = ["DPO", "IPO", "KTO", "OBJECTIVES", "ORPO", "Loss", "NextToken", "Objective", "RewardModel", "SimPO"]

OBJECTIVES: dict[str, type[Objective]] = {
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "next_token": NextToken,
    "orpo": ORPO,
    "reward_model": RewardModel,
    "simpo": SimPO,
}
