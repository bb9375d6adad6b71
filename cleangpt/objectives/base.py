"""What is learned: an objective takes a model and a batch, and gives a loss with its metrics."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.validation import Checked


class Loss(NamedTuple):
    """Sums over what an objective counts, each a 0-dim float32 tensor; the trainer divides by the count."""

    total: Tensor
    """Its gradient is followed."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """Without gradients; shown by their names."""


@dataclass(frozen=True, kw_only=True)
class Objective(Checked, section="objective"):
    """Configuration and behaviour of an objective; called with a model and a batch on the model's device."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Extras that a batch must have."""
    heads: ClassVar[frozenset[str]] = frozenset()
    """Heads that the model must have besides that of its vocabulary, each a number per position."""

    def count(self, batch: Batch) -> int:
        """What the loss is a mean over; here target tokens. The batch is on the host."""
        return batch.num_targets

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss of the batch's rows, summed over what `count` counts."""
        raise NotImplementedError
