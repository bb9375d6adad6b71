"""Next-token prediction in which bins are numbers: a bin near the target is less wrong than one far from it."""

from dataclasses import dataclass
from typing import Annotated

import torch

from cleangpt.data.batch import Batch
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import target_positions
from cleangpt.objectives.base import Loss
from cleangpt.objectives.next_token import NextToken
from cleangpt.validation import Bounds, Positive


@dataclass(frozen=True, kw_only=True)
class SoftBins(NextToken):
    """Cross-entropy per target token, of a bin with the Gaussian around it (Imani and White 2018, "Improving regression
    performance with distributional losses"). In validation it is the plain one, so that losses compare."""

    bins: tuple[Annotated[int, Bounds(0)], Annotated[int, Bounds(2)]]
    """The first of the ids that stand for numbers, and the one after the last."""
    sigma: Positive = 6.0
    """Standard deviation of the Gaussian, in bins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins[0] >= self.bins[1]:
            raise UserError(f"objective.bins is {self.bins}; allowed: a range of ids")
        if self.z_loss or self.label_smoothing:
            raise UserError("objective has z_loss or label_smoothing; allowed with SoftBins: 0")

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over targets; the plain cross-entropy is a metric."""
        if not torch.is_grad_enabled():
            return super().__call__(model, batch)
        positions, (first, end) = target_positions(batch.targets), self.bins
        logits = model(**batch.inputs, logit_positions=positions)
        assert isinstance(logits, torch.Tensor)
        logprobs, targets = logits.float().log_softmax(-1), batch.targets.flatten()[positions]
        hard = -logprobs.gather(1, targets[:, None])[:, 0]
        distances = torch.arange(first, end, device=targets.device) - targets[:, None]
        soft = -((-(distances / self.sigma).square() / 2).softmax(-1) * logprobs[:, first:end]).sum(-1)
        numeric = (targets >= first) & (targets < end)
        return Loss(torch.where(numeric, soft, hard).sum(), {"cross_entropy": hard.sum().detach()})
