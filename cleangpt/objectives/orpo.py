"""Odds ratio preference optimization (Hong et al. 2024, "ORPO: Monolithic preference optimization", eqs. 4, 6, 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.pairs import PairObjective
from cleangpt.validation import Positive


@dataclass(frozen=True, kw_only=True)
class ORPO(PairObjective):
    """Fine-tuning and preference in one: the chosen answer's cross-entropy, minus λ log σ(difference of log-odds).

    Both are of p, the geometric mean of an answer's token probabilities; its odds are p / (1 - p). Needs no reference.
    """

    weight: Positive = 0.1
    """λ: weight of the preference."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over pairs."""
        pair = self.pairs(model, batch)
        chosen, rejected = (answer.logprob / answer.length for answer in (pair.chosen, pair.rejected))
        margin = log_odds(chosen) - log_odds(rejected)
        return Loss(pair.sum(-chosen - self.weight * logsigmoid(margin)), pair.metrics(margin))


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, also near p = 1, where 1 - p would be rounded to 0."""
    below = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return below - torch.log(-torch.expm1(below))
