"""Identity preference optimization (Azar et al. 2023, "A general theoretical paradigm", eq. 17)."""

from dataclasses import dataclass
from typing import ClassVar

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.pairs import REFERENCE, PairObjective
from cleangpt.validation import Positive


@dataclass(frozen=True, kw_only=True)
class IPO(PairObjective):
    """(h - 1 / 2β)² per pair, h as in DPO: a margin to reach, not to grow beyond, so that few pairs do not overfit."""

    reads: ClassVar[frozenset[str]] = frozenset({REFERENCE})

    beta: Positive = 0.1
    """β, the paper's τ: the margin aimed at is 1 / 2β."""
    length_normalised: bool = True
    """Take the mean log-ratio per token, as the authors do in practice, rather than the sum of the equation."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over pairs."""
        pair = self.pairs(model, batch)
        chosen, rejected = (
            answer.log_ratio / (answer.length if self.length_normalised else 1)
            for answer in (pair.chosen, pair.rejected)
        )
        margin = chosen - rejected
        return Loss(pair.sum((margin - 1 / (2 * self.beta)).square()), pair.metrics(margin))
