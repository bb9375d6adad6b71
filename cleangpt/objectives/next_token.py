"""Next-token prediction. For supervised fine-tuning, the data's loss mask leaves only answers as targets."""

from dataclasses import dataclass

import torch

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.base import Loss, Objective
from cleangpt.validation import NonNegative, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Cross-entropy in nats per target token. Its regularizers apply to training only, so validation losses compare."""

    z_loss: NonNegative = 0.0
    """Coefficient of the z-loss log² Z, which keeps the softmax normalizer Z near 1 (Chowdhery et al. 2022, "PaLM",
    section 5, which uses 1e-4); 0: off."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of each target's probability that is spread over the vocabulary (Szegedy et al. 2016, "Rethinking the
    Inception architecture", section 7); 0: off."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over targets; with a regularizer, the plain cross-entropy is a metric."""
        names = [name for name, weight in (("log_z", self.z_loss), ("mean_logprob", self.label_smoothing)) if weight]
        if not names or not torch.is_grad_enabled():
            plain: TokenScores = model(**batch.inputs, targets=batch.targets, summed=True)
            return Loss(-plain.logprobs)
        scores: TokenScores = model(**batch.inputs, targets=batch.targets, scores=names)
        cross_entropy = total = -scores.logprobs.sum()
        if scores.mean_logprob is not None:
            total = (1 - self.label_smoothing) * total - self.label_smoothing * scores.mean_logprob.sum()
        if scores.log_z is not None:
            total = total + self.z_loss * scores.log_z.square().sum()
        return Loss(total, {"cross_entropy": cross_entropy.detach()})
