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
    """Detached sums to log besides the loss, by name; of a name that ends in _max the largest is logged instead."""


@dataclass(frozen=True, kw_only=True)
class Objective(Checked, section="objective"):
    """A loss and its configuration.

    Everything that needs no gradient, such as rewards or a reference model's log-probabilities, comes with the batch.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Names in `Batch.extras` that a batch must have."""
    group: ClassVar[tuple[str, ...]] = ()
    """Roles of neighbouring rows that it compares, such as chosen and rejected; empty: any rows."""
    per_token: ClassVar[bool] = True
    """Whether the loss is a cross-entropy per token, which has a perplexity."""
    predicts: ClassVar[bool] = True
    """Whether the loss reads log-probabilities; if not, the language-model head gets no gradient."""
    heads: ClassVar[frozenset[str]] = frozenset()
    """Scalar heads to add to the model, such as a value head; their outputs are in `TokenScores.heads`."""
    on_policy: ClassVar[bool] = False
    """Whether batches are rollouts of the policy, as the section `rollouts` says, instead of the corpus's samples."""

    @property
    def scores_answers(self) -> bool:
        """Whether the loss compares or rewards whole answers, instead of predicting every token."""
        return self.on_policy or not self.per_token

    def count(self, batch: Batch) -> int:
        """The number of things the loss is averaged over, by default the batch's targets. The batch is on the host."""
        return batch.num_targets

    @property
    def step_means(self) -> tuple[str, ...]:
        """Names of means over the whole step that the loss reads, such as KTO's KL; see `objectives/step_means.py`."""
        return ()

    def step_sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """The sums over a batch, 0-dim, of the `step_means`; called without gradient, before the loss of any batch."""
        return {}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss of a batch on the model's device, summed over everything counted."""
        raise NotImplementedError
