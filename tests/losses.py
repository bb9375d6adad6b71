"""The loss of plain tensors, for tests that have no batches."""

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.next_token import NextToken


def next_token(model: LanguageModel, tokens: Tensor, targets: Tensor, **fields: float) -> Tensor:
    """The summed loss of `targets` `(batch, seq)` after `tokens` `(batch, seq)`; `fields` are those of `NextToken`."""
    return NextToken(**fields)(model, Batch({"tokens": tokens}, targets)).total
