"""RLOO: REINFORCE with the other answers to the same prompt as baseline."""

from dataclasses import dataclass

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.policy import (
    MOST,
    PolicyObjective,
    Round,
    answer_mask,
    clipped,
    count_answers,
    leave_one_out,
    log_ratios,
    ratio_metrics,
    token_weights,
)
from cleangpt.validation import Positive, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class RLOO(PolicyObjective):
    """-min(ρ A, clip(ρ) A) with the ratio ρ of a whole answer, mean over answers.

    Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE-style optimization for learning from human feedback in
    LLMs", section 3.2, with PPO's clipping for several updates per round. At ρ = 1 the gradient is that of REINFORCE.
    """

    clip_low: ShareBelowOne = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped at 1 + clip_high."""

    def count(self, batch: Batch) -> int:
        """Answers."""
        return count_answers(batch)

    def estimate(self, rollouts: Round) -> dict[str, Tensor]:
        """The same advantage at every token of an answer; the KL term is in the reward."""
        scores = rollouts.kl_rewards().sum(dim=1)
        advantages = leave_one_out(scores, rollouts.counted, rollouts.group)
        return {"advantages": advantages[:, None] * rollouts.mask}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over answers."""
        scores, mask = self.scores(model, batch), answer_mask(batch)
        advantages = batch.extras["advantages"].masked_fill(~mask, 0.0)
        ratio = log_ratios(scores.logprobs, batch.extras["old_logprobs"], mask).sum(dim=1, keepdim=True)
        ratio = ratio.clamp(-MOST, MOST).exp().expand_as(advantages)
        # An answer's tokens have equal advantages, so their mean is the answer's loss.
        weights = token_weights(mask, "sequence", advantages.dtype)
        loss = (weights * clipped(ratio, advantages, self.clip_low, self.clip_high)).sum()
        metrics = ratio_metrics(batch, scores.logprobs, ratio, advantages, weights, self.clip_low, self.clip_high)
        return self.with_entropy(loss, scores, weights, metrics)
