"""Next-token prediction: the cross-entropy of each target under the model's logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.data.batches import IGNORED


def next_token(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy in nats, float32, of `targets` `(batch, seq)` after `inputs` `(batch, seq)`."""
    logits: Tensor = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
