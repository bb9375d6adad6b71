"""GRPO and, by its fields, Dr. GRPO, DAPO and GSPO."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.policy import (
    Norm,
    PolicyObjective,
    Round,
    answer_mask,
    check_estimator,
    clipped,
    count_answers,
    group_advantages,
    kl_loss,
    log_ratios,
    ratio_metrics,
    token_weights,
)
from cleangpt.validation import Positive, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class GRPO(PolicyObjective):
    """-min(ρ_t A, clip(ρ_t) A), where A compares an answer with the others to its prompt.

    Shao et al. 2024, "DeepSeekMath", equation 3. Dr. GRPO (Liu et al. 2025, section 3.2): standardise False, norm
    constant. DAPO (Yu et al. 2025, equations 8 and 12): norm token, clip_high 0.28, and the rollouts' dynamic_sampling
    and overlong_tokens. GSPO (Zheng et al. 2025, equation 5): ratio sequence, clip_low 3e-4, clip_high 4e-4.
    """

    standardise: bool = True
    """Divide advantages by the standard deviation of their group's rewards."""
    norm: Norm = "sequence"
    """Mean of the loss. sequence: over the answers, of the mean over each one's tokens; token: over all tokens of a
    step; constant: over the answers, of the sum over each one's tokens divided by `constant_length`."""
    constant_length: Positive = 1.0
    """With norm constant: the divisor, usually the most tokens that an answer may have."""
    ratio: Literal["token", "sequence"] = "token"
    """token: each token's ratio of probabilities; sequence: the geometric mean over the answer's tokens."""
    clip_low: ShareBelowOne = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped at 1 + clip_high."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_ratio"] = "k3_ratio"
    """Estimator of the KL divergence in the loss: k2 or k3_ratio, k3 times the importance ratio; k1 and k3 by
    themselves have other gradients and are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_estimator(self.kl_estimator)

    def count(self, batch: Batch) -> int:
        """Tokens with norm token, else answers."""
        return batch.num_targets if self.norm == "token" else count_answers(batch)

    def estimate(self, rollouts: Round) -> dict[str, Tensor]:
        """The same advantage at every token of an answer."""
        advantages = group_advantages(rollouts.returns, rollouts.counted, rollouts.group, self.standardise)
        return {"advantages": advantages[:, None] * rollouts.mask}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over what `norm` counts."""
        scores, mask, old = self.scores(model, batch), answer_mask(batch), batch.extras["old_logprobs"]
        advantages = batch.extras["advantages"].masked_fill(~mask, 0.0)
        means = token_weights(mask, self.norm, old.dtype)
        weights = mask.to(old.dtype) / self.constant_length if self.norm == "constant" else means
        log_ratio = log_ratios(scores.logprobs, old, mask)
        if self.ratio == "sequence":
            log_ratio = (
                (token_weights(mask, "sequence", old.dtype) * log_ratio).sum(dim=1, keepdim=True).expand_as(log_ratio)
            )
        ratio = log_ratio.exp()
        loss = (weights * clipped(ratio, advantages, self.clip_low, self.clip_high)).sum()
        metrics = ratio_metrics(batch, scores.logprobs, ratio, advantages, means, self.clip_low, self.clip_high)
        if self.kl_coef:
            divergence = kl_loss(self.kl_estimator, scores.logprobs, batch.extras["reference_logprobs"], old, mask)
            loss = loss + self.kl_coef * (weights * divergence).sum()
            metrics["kl_loss"] = (means * divergence).sum().detach()
        return self.with_entropy(loss, scores, weights, metrics)
