"""Next-token prediction: the cross-entropy of each target under the model's logits, with or without a z-loss."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.data.batches import IGNORED
from cleangpt.objectives.chunks import LossOf, loss_in_chunks


def next_token(model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """The summed cross-entropy in nats, float32, of `targets` `(batch, seq)` after `inputs` `(batch, seq)`.

    With `chunk`, the logits of so many tokens exist at a time.
    """
    return _summed(model, inputs, targets, _cross_entropy, chunk)


def next_token_z(
    model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int | None = None, coefficient: float = 1e-4
) -> Tensor:
    """`next_token` plus coefficient x log² Z, summed over the targets, Z being the sum of the exponentials of logits.

    It keeps log Z near 0, so that logits do not drift away together (Chowdhery et al. 2022, "PaLM", section 5). Only
    what is learned from has it: without gradients, as in validation, this is `next_token`.
    """
    loss_of = partial(_with_z, coefficient=coefficient) if torch.is_grad_enabled() else _cross_entropy
    return _summed(model, inputs, targets, loss_of, chunk)


def _summed(model: nn.Module, inputs: Tensor, targets: Tensor, loss_of: LossOf, chunk: int | None) -> Tensor:
    if chunk is not None:
        return loss_in_chunks(model, inputs, targets, loss_of, chunk)
    return loss_of(model(inputs).flatten(0, 1), targets.flatten())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def _with_z(logits: Tensor, targets: Tensor, coefficient: float) -> Tensor:
    log_z = logits.float().logsumexp(dim=-1) * (targets != IGNORED)
    return _cross_entropy(logits, targets) + coefficient * log_z.square().sum()
