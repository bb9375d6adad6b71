"""Next-token prediction: the cross-entropy of each target under the model's logits, with or without a z-loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.data.batches import IGNORED


def next_token(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy in nats, float32, of `targets` `(batch, seq)` after `inputs` `(batch, seq)`."""
    return _cross_entropy(model(inputs), targets)


def next_token_z(model: nn.Module, inputs: Tensor, targets: Tensor, coefficient: float = 1e-4) -> Tensor:
    """`next_token` plus coefficient x log² Z, summed over the targets, Z being the sum of the exponentials of logits.

    It keeps log Z near 0, so that logits do not drift away together (Chowdhery et al. 2022, "PaLM", section 5). Only
    what is learned from has it: without gradients, as in validation, this is `next_token`.
    """
    logits: Tensor = model(inputs)
    loss = _cross_entropy(logits, targets)
    if not torch.is_grad_enabled():
        return loss
    log_z = logits.float().logsumexp(dim=-1) * (targets != IGNORED)
    return loss + coefficient * log_z.square().sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
