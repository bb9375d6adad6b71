"""Simple preference optimization (Meng et al. 2024, "SimPO: Simple preference optimization", eq. 6)."""

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.pairs import PairObjective
from cleangpt.validation import NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class SimPO(PairObjective):
    """-log σ(β (mean log-probability per token of the chosen - of the rejected answer) - γ); needs no reference."""

    beta: Positive = 2.0
    """β: scale of the difference."""
    gamma: NonNegative = 1.0
    """γ: margin by which the chosen answer should win."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over pairs."""
        pair = self.pairs(model, batch)
        chosen, rejected = (self.beta * answer.logprob / answer.length for answer in (pair.chosen, pair.rejected))
        return Loss(pair.sum(-logsigmoid(chosen - rejected - self.gamma)), pair.metrics(chosen - rejected))
