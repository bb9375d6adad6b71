"""Objectives by name: one file each; registering is one line here."""

from cleangpt.objectives.base import Loss, Objective
from cleangpt.objectives.next_token import NextToken

__all__ = ["OBJECTIVES", "Loss", "NextToken", "Objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
}
