"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, "KTO: Model alignment as prospect theoretic optimization")."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss, Objective
from cleangpt.objectives.pairs import REFERENCE, answers, sums
from cleangpt.validation import NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """Single answers, each desirable or not (eq. 7): λ (1 - σ(β (r - z₀))) for one that is, λ (1 - σ(β (z₀ - r))) else.

    r is the answer's log-ratio to the reference, and z₀ an estimate of the KL divergence from it: the mean log-ratio of
    answers to other prompts, over the whole step and at least 0, without gradient. The dataset has such an answer below
    each row.
    """

    reads: ClassVar[frozenset[str]] = frozenset({REFERENCE, "desirable"})
    group: ClassVar[tuple[str, ...]] = ("answer", "mismatched")
    per_token: ClassVar[bool] = False

    beta: Positive = 0.1
    """β: how strongly the model is held to the reference; larger: more."""
    desirable_weight: NonNegative = 1.0
    """λ_D; choose it so that both kinds weigh about the same (eq. 8)."""
    undesirable_weight: NonNegative = 1.0
    """λ_U."""

    def count(self, batch: Batch) -> int:
        """The number of answers."""
        return int((batch.targets[::2] != IGNORED).any(dim=-1).sum())

    @property
    def step_means(self) -> tuple[str, ...]:
        """z₀, before it is clamped."""
        return ("kl",)

    def step_sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """The log-ratios of the mismatched answers."""
        below = batch.rows(slice(1, None, 2))
        return {"kl": answers(model, below).log_ratio.sum()}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over answers."""
        above = batch.rows(slice(None, None, 2))
        found, wanted = answers(model, above), above.extras["desirable"][:, 0] == 1
        gain = self.beta * (found.log_ratio - above.extras["kl"].clamp(min=0))
        weight = torch.where(wanted, self.desirable_weight, self.undesirable_weight)
        loss = weight * torch.sigmoid(torch.where(wanted, -gain, gain))
        logged = {
            "desirable_log_ratio": found.log_ratio * wanted, "undesirable_log_ratio": found.log_ratio * ~wanted,
            "desirable_share": wanted.float(), "kl": above.extras["kl"],
        }  # fmt: skip
        return Loss(torch.where(found.counted, loss, 0.0).sum(), sums(logged, found.counted))
