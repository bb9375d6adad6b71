"""Reward models from preferences (Ouyang et al. 2022, "Training language models to follow instructions", eq. 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.base import Loss
from cleangpt.objectives.pairs import PairObjective, counted_pairs, right, sums
from cleangpt.validation import NonNegative

HEAD = "reward"
"""Name of the scalar head."""


@dataclass(frozen=True, kw_only=True)
class RewardModel(PairObjective):
    """-log σ(r_w - r_l - margin) + c (r_w + r_l)², where the reward r is a scalar head's at the answer's last token.

    Bradley and Terry 1952; the margin of each pair, 0 unless the data has one, is that of Touvron et al. 2023 ("Llama
    2", eq. 2). Differences of rewards leave their mean open; the last term centres it (Eisenstein et al. 2023, "Helping
    or herding?", eq. 2).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"margin"})
    heads: ClassVar[frozenset[str]] = frozenset({HEAD})
    predicts: ClassVar[bool] = False

    centring: NonNegative = 0.01
    """c: weight of the term that keeps the mean reward near 0."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over pairs; overconfidence is how sure the model is, minus how often it is right."""
        chosen, rejected = rewards(model, batch).view(-1, 2).unbind(dim=-1)
        counted = counted_pairs(batch)
        margin = chosen - rejected
        loss = -logsigmoid(margin - batch.extras["margin"][::2, 0]) + self.centring * (chosen + rejected).square()
        logged = {
            "accuracy": right(margin), "margin": margin,
            "overconfidence": torch.sigmoid(margin.abs()) - right(margin),
            "mean_reward": (chosen + rejected) / 2,
        }  # fmt: skip
        return Loss(torch.where(counted, loss, 0.0).sum(), sums(logged, counted))


def rewards(model: LanguageModel, batch: Batch) -> Tensor:
    """The reward of every row `(rows,)`: the head's output where the model has read the answer's last token."""
    counts = batch.targets != IGNORED
    scores: TokenScores = model(**batch.inputs, scores=[HEAD])
    places = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    last = (counts * places).amax(dim=-1).clamp(max=counts.shape[1] - 1)
    return scores.heads[HEAD].gather(1, last[:, None])[:, 0]
