"""What the policy objectives share: advantages, ratios and their clipping, KL estimators, and how tokens are averaged.

x is a prompt, y an answer, m the mask of the answer's own tokens. log π(y_t | x, y_<t) is at the sampling temperature
and over the tokenizer's vocabulary. A round of rollouts is turned into advantages once, by the source of batches, with
statistics over the whole round; an objective is then a pure function of a batch (design: what needs no gradient is
data).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.base import Loss, Objective
from cleangpt.validation import NonNegative

MOST = 20.0
"""Largest log-ratio that is exponentiated: beyond it a ratio is clipped anyway, and its gradient would overflow."""

KL_GRADIENTS = {
    "k1": "whose gradient is 0 in expectation",
    "k3": "whose gradient is that of the reverse, KL(reference || policy)",
}
"""Estimators with the right value and another gradient than that of KL(policy || reference)."""


@dataclass
class Round:
    """A round of rollouts before its advantages are known; rows are answers, and those of a prompt are neighbors."""

    mask: Tensor
    """The policy's own tokens that count `(rows, seq)`, bool; a row without any is left out everywhere."""
    rewards: Tensor
    """At the last token of each action `(rows, seq)`, float64; 0 elsewhere."""
    logprobs: Tensor
    """Of the sampled tokens `(rows, seq)`, float64; 0 outside of the mask."""
    group: int
    """Answers to a prompt."""
    reference: Tensor | None = None
    """Log-probabilities under the reference model, as `logprobs`."""
    values: Tensor | None = None
    """Of the state before each token, as `logprobs`."""
    kl_coef: float = 0.0
    """Of the KL term in the reward, from a controller or fixed."""

    @property
    def counted(self) -> Tensor:
        """Which answers count `(rows,)`, bool."""
        return self.mask.any(dim=1)

    @property
    def returns(self) -> Tensor:
        """The total reward of each answer `(rows,)`."""
        return self.rewards.sum(dim=1)

    def kl_rewards(self) -> Tensor:
        """Rewards with the KL term, -kl_coef · k1 at every token: `(rows, seq)`.

        Its policy gradient is that of KL(policy || reference).
        """
        if self.reference is None or not self.kl_coef:
            return self.rewards
        return self.rewards - self.kl_coef * (self.logprobs - self.reference) * self.mask


@dataclass(frozen=True, kw_only=True)
class PolicyObjective(Objective):
    """A policy-gradient loss, whose batches are rollouts of the policy itself."""

    on_policy: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"advantages", "old_logprobs", "fresh"})

    kl_coef: NonNegative = 0.0
    """Coefficient of the KL divergence from the initial model, in nats; 0: off."""
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy bonus; 0: off."""

    def estimate(self, rollouts: Round) -> dict[str, Tensor]:
        """The columns `(rows, seq)` that a round of rollouts gets besides its tokens: advantages, returns."""
        raise NotImplementedError

    def scores(self, model: LanguageModel, batch: Batch) -> TokenScores:
        """Scores of a batch's answers under the current policy."""
        names = [*self.heads, *(["entropy"] if self.entropy_coef else [])]
        scores: TokenScores = model(**batch.inputs, targets=batch.targets, scores=names)
        return scores

    def with_entropy(self, loss: Tensor, scores: TokenScores, weights: Tensor, metrics: dict[str, Tensor]) -> Loss:
        """The loss with the entropy bonus, where there is one, averaged as `weights` say."""
        if scores.entropy is not None:
            entropy = (weights * scores.entropy).sum()
            loss, metrics = loss - self.entropy_coef * entropy, metrics | {"entropy": entropy.detach()}
        return Loss(loss, metrics)


# Averages -------------------------------------------------------------------------------------------------------------
Norm = Literal["token", "sequence", "constant"]


def answer_mask(batch: Batch) -> Tensor:
    """The policy's own tokens `(rows, seq)`, bool."""
    return batch.targets != IGNORED


def count_answers(batch: Batch) -> int:
    """Answers that are not left out."""
    return int(answer_mask(batch).any(dim=1).sum())


def token_weights(mask: Tensor, norm: Norm, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights `(rows, seq)` whose sum of products with per-token losses, divided by the count, is their mean.

    token: over all tokens (the count is tokens); sequence: of each answer's mean over its tokens (the count is
    answers). A constant length is the same as `sequence` with each answer's length replaced by the constant.
    """
    weights = mask.to(dtype)
    return weights if norm == "token" else weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


# Ratios ---------------------------------------------------------------------------------------------------------------
def log_ratios(logprobs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """log π - log π_old `(rows, seq)`, 0 outside of the mask, whatever is there; at most ±20."""
    return torch.where(mask, logprobs - old, 0.0).clamp(-MOST, MOST)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - low, 1 + high) A): Schulman et al. 2017, "Proximal policy optimization", equation 7."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def ratio_metrics(
    batch: Batch, logprobs: Tensor, ratio: Tensor, advantages: Tensor, weights: Tensor, low: float, high: float
) -> dict[str, Tensor]:
    """What clipping does, and how far the trainer is from the sampler before the round's first update."""
    mask, ratio = answer_mask(batch), ratio.detach()
    old, fresh = batch.extras["old_logprobs"], batch.extras["fresh"][:, None] > 0
    gap = torch.where(mask & fresh, logprobs.detach() - old, 0.0).abs()
    return {
        "clip_low": (weights * ((ratio < 1 - low) & (advantages < 0))).sum(),
        "clip_high": (weights * ((ratio > 1 + high) & (advantages > 0))).sum(),
        "ratio_max": torch.where(mask, ratio, 0.0).max(),
        "logprob_gap_max": gap.max(),
    }


# Divergence from the reference ----------------------------------------------------------------------------------------
def kl_loss(estimator: str, logprobs: Tensor, reference: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) at each token `(rows, seq)` whose gradient, too, is right in expectation.

    With d = log π - log π_ref at a token drawn from the policy (Schulman 2020, "Approximating KL divergence"):
    k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d. In a loss, the gradient of k1 is 0, that of k2 is ∇KL(π || ref), that of k3
    is ∇KL(ref || π), and that of k3 times the importance ratio π / π_old is ∇KL(π || ref).
    """
    d = log_ratios(logprobs, reference, mask)
    if estimator == "k2":
        return d.square() / 2
    return log_ratios(logprobs, old, mask).exp() * ((-d).exp() - 1 + d)


def check_estimator(estimator: str) -> None:
    """Refuses an estimator whose gradient is not that of the divergence.

    Raises:
        UserError: names those that are right.
    """
    if estimator in KL_GRADIENTS:
        raise UserError(
            f"objective.kl_estimator is {estimator!r}, {KL_GRADIENTS[estimator]} where it stands in a loss; "
            "allowed: k2, k3_ratio"
        )


# Advantages -----------------------------------------------------------------------------------------------------------
def group_advantages(scores: Tensor, counted: Tensor, group: int, standardise: bool) -> Tensor:
    """Scores minus their group's mean, divided by its standard deviation (with n - 1) + 1e-4 if they are standardised.

    Shao et al. 2024, "DeepSeekMath", section 4.1.2; without division Liu et al. 2025, "Understanding R1-Zero-like
    training", section 3.2. Answers that do not count are left out of the statistics and get 0, as does a group of one.

    Args:
        scores: `(answers,)`, float64; the answers of a group are neighbors.
        counted: which answers count `(answers,)`.
        group: answers in a group.
        standardise: divide by the standard deviation.
    """
    scores, weights = scores.view(-1, group), counted.view(-1, group).to(scores.dtype)
    count = weights.sum(dim=1, keepdim=True)
    centered = (scores - (weights * scores).sum(dim=1, keepdim=True) / count.clamp(min=1)) * weights
    if standardise:
        deviation = (centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centered = centered / (deviation + 1e-4)
    lowest = torch.where(weights > 0, scores, math.inf).amin(dim=1, keepdim=True)
    highest = torch.where(weights > 0, scores, -math.inf).amax(dim=1, keepdim=True)
    return torch.where(lowest < highest, centered, 0.0).flatten()  # equal scores do not differ by rounding either


def leave_one_out(scores: Tensor, counted: Tensor, group: int) -> Tensor:
    """Scores minus the mean of the group's other answers, shapes as in `group_advantages`.

    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, "Back to basics". The
    gradient is unbiased, since the baseline does not depend on the answer.
    """
    weights = counted.view(-1, group).to(scores.dtype)
    count = weights.sum(dim=1, keepdim=True)
    return (
        group_advantages(scores, counted, group, False)
        * (count / (count - 1).clamp(min=1)).expand_as(weights).flatten()
    )


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimates `(rows, seq)`: Schulman et al. 2015, equation 16.

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1}, from each token of the mask to the next one in it; behind
    the last there is nothing, so V and A are 0.
    """
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        here = mask[:, step]
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        advantages[:, step] = torch.where(here, delta + gamma * lam * following, 0.0)
        following = torch.where(here, advantages[:, step], following)
        next_value = torch.where(here, values[:, step], next_value)
    return advantages


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / √(variance + 1e-8) over the tokens of the mask, with n - 1; 0 outside of it."""
    count = mask.sum()
    mean = torch.where(mask, values, 0.0).sum() / count.clamp(min=1)
    centered = torch.where(mask, values - mean, 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    return centered / (variance + 1e-8).sqrt()
