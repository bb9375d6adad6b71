"""What a model learns: an objective maps a model and a batch to a loss and metrics."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.validation import Checked


class Loss(NamedTuple):
    """Sums over everything the objective counts, each a 0-dim float32 tensor; the trainer divides by the count."""

    total: Tensor
    """What is minimized."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """Detached sums to log besides the loss, by name."""


@dataclass(frozen=True, kw_only=True)
class Objective(Checked, section="objective"):
    """Configuration and computation of a loss.

    What needs no gradient, such as rewards or the log-probabilities of a reference model, comes with the batch.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Names in `Batch.extras` that a batch must have."""
    heads: ClassVar[frozenset[str]] = frozenset()
    """Scalar heads that the model gets besides its language-model head; read from `TokenScores.heads`."""

    def count(self, batch: Batch) -> int:
        """What the loss is averaged over: by default the batch's targets. The batch is in host memory."""
        return batch.num_targets

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss of a batch on the model's device, summed over everything counted."""
        raise NotImplementedError
