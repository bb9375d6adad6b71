"""What objectives on pairs of answers have in common: the log-probabilities of both, and what is logged of them.

Rows alternate between the chosen and the rejected answer to a prompt. A pair counts if both have targets; one that
fills up the last batch of a validation has none, and adds nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.base import Objective

REFERENCE = "reference_logprobs"
"""Name of the extra with the reference model's log-probabilities of the targets `(rows, seq)`."""


class Answers(NamedTuple):
    """Answers of a batch, one per row `(rows,)`, or per pair `(pairs,)`."""

    logprob: Tensor
    """Log-probability of the whole answer, its end token included, in nats."""
    reference: Tensor
    """The same under the reference model; 0 without one."""
    length: Tensor
    """Tokens in the answer, at least 1, so that one may divide by it."""
    counted: Tensor
    """Whether there is an answer, bool."""

    @property
    def log_ratio(self) -> Tensor:
        """log π(y|x) - log π_ref(y|x)."""
        return self.logprob - self.reference


def answers(model: LanguageModel, batch: Batch, with_reference: bool = True) -> Answers:
    """The answer of every row; what stands in the batch behind the mask changes nothing, NaN included."""
    counts = batch.targets != IGNORED
    scores: TokenScores = model(**batch.inputs, targets=batch.targets)
    reference = batch.extras[REFERENCE] if with_reference else torch.zeros_like(scores.logprobs)
    given = torch.where(counts, reference, 0.0).sum(dim=-1)
    length = counts.sum(dim=-1)
    return Answers(scores.logprobs.sum(dim=-1), given, length.clamp(min=1), length > 0)


class Pair(NamedTuple):
    """The answers to each prompt, `(pairs,)` each."""

    chosen: Answers
    rejected: Answers
    referenced: bool
    """Whether there is a reference."""

    @property
    def counted(self) -> Tensor:
        """Whether the pair has both answers, bool."""
        return self.chosen.counted & self.rejected.counted

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a value per pair, over the pairs that count."""
        return torch.where(self.counted, values, 0.0).sum()

    def metrics(self, margin: Tensor) -> dict[str, Tensor]:
        """Sums to log: the implicit rewards' `margin`, how often it is right (a tie is half right), and the log-ratios,
        of which DPO may lower both; without a reference, the log-probabilities."""
        kind = "log_ratio" if self.referenced else "logprob"
        logged = {
            "accuracy": right(margin), "margin": margin, f"chosen_{kind}": self.chosen.log_ratio,
            f"rejected_{kind}": self.rejected.log_ratio,
        }  # fmt: skip
        return sums(logged, self.counted)


def counted_pairs(batch: Batch) -> Tensor:
    """Which pairs have both answers `(pairs,)`, bool."""
    return (batch.targets != IGNORED).any(dim=-1).view(-1, 2).all(dim=-1)


def sums(values: Mapping[str, Tensor], counted: Tensor) -> dict[str, Tensor]:
    """The sum of each value over what counts, to be logged; both have the same shape."""
    return {name: torch.where(counted, value.detach(), 0.0).sum() for name, value in values.items()}


def right(margin: Tensor) -> Tensor:
    """1 where a margin prefers the chosen answer, 0 where the rejected one, 0.5 where neither."""
    return (margin.sign() + 1) / 2


@dataclass(frozen=True, kw_only=True)
class PairObjective(Objective):
    """Base class: a mean over pairs of a chosen and a rejected answer to one prompt."""

    group: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    per_token: ClassVar[bool] = False

    def count(self, batch: Batch) -> int:
        """The number of pairs that have both answers."""
        return int(counted_pairs(batch).sum())

    def pairs(self, model: LanguageModel, batch: Batch) -> Pair:
        """Both answers to every prompt."""
        referenced = REFERENCE in self.reads
        found = answers(model, batch, referenced)
        chosen, rejected = (Answers(*(values[row::2] for values in found)) for row in (0, 1))
        return Pair(chosen, rejected, referenced)
