"""PPO: proximal policy optimization with a value head."""

from dataclasses import dataclass
from typing import ClassVar

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
    log_ratios,
    ratio_metrics,
    whiten,
)
from cleangpt.validation import Count, NonNegative, Positive, Share, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class PPO(PolicyObjective):
    """-min(ρ_t A_t, clip(ρ_t) A_t) plus the value loss, mean over tokens: Schulman et al. 2017, equations 7 and 9.

    Advantages are Schulman et al. 2015's (equation 16), from rewards with -kl_coef · log(π_old / π_ref) at every token
    and the answer's reward at its last (Ziegler et al. 2019, equation 2). The value loss is
    ½ max((V - G)², (V_old + clip(V - V_old, ±value_clip) - G)²), as in OpenAI's baselines.
    """

    reads: ClassVar[frozenset[str]] = PolicyObjective.reads | {"returns", "old_values"}
    heads: ClassVar[frozenset[str]] = frozenset({"value"})

    clip: ShareBelowOne = 0.2
    """The ratio is clipped to 1 ± clip."""
    gamma: Share = 1.0
    """Discount of future rewards."""
    lam: Share = 0.95
    """λ of generalized advantage estimation: 0 trusts the values, 1 the rewards."""
    whiten: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over all tokens of a round."""
    value_coef: NonNegative = 0.5
    """Coefficient of the value loss."""
    value_clip: Positive = 0.2
    """How far a value may move from the old one before its loss stops falling."""
    kl_target: Positive | None = None
    """Adaptive KL controller: kl_coef rises and falls so that an answer diverges by this many nats (Ziegler et al.
    2019, section 2.2). None: it is fixed."""
    kl_horizon: Count = 10_000
    """Answers over which the controller adapts."""

    def estimate(self, rollouts: Round) -> dict[str, Tensor]:
        """Advantages, returns and the old values."""
        assert rollouts.values is not None
        advantages = gae(rollouts.kl_rewards(), rollouts.values, rollouts.mask, self.gamma, self.lam)
        returns = advantages + rollouts.values * rollouts.mask
        if self.whiten:
            advantages = whiten(advantages, rollouts.mask)
        return {"advantages": advantages, "returns": returns, "old_values": rollouts.values}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over the answers' tokens."""
        scores, mask, old = self.scores(model, batch), answer_mask(batch), batch.extras
        advantages = old["advantages"].masked_fill(~mask, 0.0)
        ratio = log_ratios(scores.logprobs, old["old_logprobs"], mask).exp()
        policy_loss = (mask * clipped(ratio, advantages, self.clip, self.clip)).sum()
        value_loss = clipped_value_loss(scores.heads["value"], old["old_values"], old["returns"], mask, self.value_clip)
        metrics = ratio_metrics(batch, scores.logprobs, ratio, advantages, mask.float(), self.clip, self.clip)
        metrics["value_loss"] = value_loss.detach()
        return self.with_entropy(policy_loss + self.value_coef * value_loss, scores, mask.float(), metrics)

    def next_kl_coef(self, kl_coef: float, divergence: float, answers: int) -> float:
        """The controller's next coefficient, after a round of `answers` whose divergence, in nats, had this mean."""
        if self.kl_target is None:
            return kl_coef
        error = min(max(divergence / self.kl_target - 1, -0.2), 0.2)
        return kl_coef * (1 + error * answers / self.kl_horizon)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """½ Σ max((V - G)², (V_old + clip(V - V_old, ±clip) - G)²) over the tokens of the mask, 0-dim."""
    values, old, returns = (torch.where(mask, tensor, 0.0) for tensor in (values, old, returns))
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()).sum() / 2
