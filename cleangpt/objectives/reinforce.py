"""REINFORCE with a baseline."""

from dataclasses import dataclass

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.policy import PolicyObjective, Round, answer_mask, count_answers, leave_one_out


@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyObjective):
    """-A Σ_t log π(y_t), mean over answers: Williams 1992, "Simple statistical gradient-following algorithms", eq. 11.

    A is the reward minus a baseline, the mean of all other answers of the round. There is no ratio, so it is exact for
    a single update per round.
    """

    def count(self, batch: Batch) -> int:
        """Answers."""
        return count_answers(batch)

    def estimate(self, rollouts: Round) -> dict[str, Tensor]:
        """The same advantage at every token of an answer."""
        scores = rollouts.kl_rewards().sum(dim=1)
        advantages = leave_one_out(scores, rollouts.counted, len(scores))
        return {"advantages": advantages[:, None] * rollouts.mask}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over answers."""
        scores, mask = self.scores(model, batch), answer_mask(batch)
        loss = -(scores.logprobs * batch.extras["advantages"]).masked_fill(~mask, 0.0).sum()
        return self.with_entropy(loss, scores, mask.float(), {})
