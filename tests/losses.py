"""Losses for tests: of plain tensors, where there are no batches, and of an objective that goes wrong on the way."""

from collections.abc import Callable

from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Loss, NextToken, Objective


def next_token(model: LanguageModel, tokens: Tensor, targets: Tensor, **fields: float) -> Tensor:
    """The summed loss of `targets` `(batch, seq)` after `tokens` `(batch, seq)`; `fields` are those of `NextToken`."""
    return NextToken(**fields)(model, Batch({"tokens": tokens}, targets)).total


def scaled(objective: Objective, factor: Callable[[], float]) -> Objective:
    """The objective with its loss multiplied by a factor, asked for at each call."""

    class Scaled(Objective):
        def count(self, batch: Batch) -> int:
            return objective.count(batch)

        def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
            loss = objective(model, batch)
            return loss._replace(total=loss.total * factor())

    return Scaled()
