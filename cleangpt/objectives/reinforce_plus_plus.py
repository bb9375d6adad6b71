"""REINFORCE++: PPO's clipped ratio with whitened returns instead of a value head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.policy import (
    PolicyObjective,
    Round,
    answer_mask,
    clipped,
    gae,
    group_advantages,
    log_ratios,
    ratio_metrics,
    whiten,
)
from cleangpt.validation import Positive, Share, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(PolicyObjective):
    """-min(ρ_t A_t, clip(ρ_t) A_t), mean over tokens: Hu et al. 2025, "REINFORCE++", arXiv 2501.03262.

    A_t is the return Σ_{s≥t} γ^{s-t} r_s, shifted and scaled to mean 0 and variance 1 over all tokens of a round, where
    r_s is -kl_coef · log(π_old / π_ref), and at the last token the answer's reward as well.
    """

    gamma: Share = 1.0
    """Discount of future rewards."""
    group_baseline: bool = False
    """Subtract the mean reward of the answers to the same prompt first, the paper's REINFORCE++-baseline."""
    clip_low: ShareBelowOne = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped at 1 + clip_high."""

    def estimate(self, rollouts: Round) -> dict[str, Tensor]:
        """The whitened returns."""
        mask, rewards = rollouts.mask, rollouts.kl_rewards()
        returns = gae(rewards, torch.zeros_like(rewards), mask, self.gamma, 1.0)
        if self.group_baseline:
            scores = rollouts.returns
            mean = scores - group_advantages(scores, rollouts.counted, rollouts.group, standardise=False)
            returns = torch.where(mask, returns - mean[:, None], 0.0)
        return {"advantages": whiten(returns, mask)}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over the answers' tokens."""
        scores, mask = self.scores(model, batch), answer_mask(batch)
        advantages = batch.extras["advantages"].masked_fill(~mask, 0.0)
        ratio = log_ratios(scores.logprobs, batch.extras["old_logprobs"], mask).exp()
        loss = (mask * clipped(ratio, advantages, self.clip_low, self.clip_high)).sum()
        weights = mask.float()
        metrics = ratio_metrics(batch, scores.logprobs, ratio, advantages, weights, self.clip_low, self.clip_high)
        return self.with_entropy(loss, scores, weights, metrics)
