"""Next-token prediction: the cross-entropy of each target under the model; where only answers are learned, a mask in
the data says so."""

from dataclasses import dataclass
from typing import cast

import torch

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.base import Loss, Objective


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Cross-entropy per target token, in nats. Its additions are trained with alone: validation has none of them."""

    z_loss: float = 0.0
    """Adds z_loss x log² Z, Z being the sum of the exponentials of the logits, which keeps them from drifting away
    together (Chowdhery et al. 2022, "PaLM", section 5, there 1e-4)."""
    label_smoothing: float = 0.0
    """Share of each target's weight that is spread over the vocabulary (Szegedy et al. 2016, section 7)."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss of the batch's rows, summed over targets."""
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if torch.is_grad_enabled() else (0.0, 0.0)
        if not smoothing and not z_loss:
            scores = cast(TokenScores, model(**batch.inputs, targets=batch.targets, summed=True))
            return Loss(-scores.logprobs)
        asked = ("log_z",) * bool(z_loss) + ("mean_logprob",) * bool(smoothing)
        scores = cast(TokenScores, model(**batch.inputs, targets=batch.targets, scores=asked))
        cross_entropy = -scores.logprobs.sum()
        total = cross_entropy
        if scores.mean_logprob is not None:
            total = (1 - smoothing) * total - smoothing * scores.mean_logprob.sum()
        if scores.log_z is not None:
            total = total + z_loss * scores.log_z.square().sum()
        return Loss(total, {"cross_entropy": cross_entropy.detach()})
