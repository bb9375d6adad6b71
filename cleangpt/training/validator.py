"""Validation after each macro-batch: the objective over the validation split of every source."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from cleangpt.data.loader import Samples, validation_batches
from cleangpt.distributed.layout import Layout
from cleangpt.distributed.processes import Ranks
from cleangpt.evaluation.validate import validate
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Objective


class Validator:
    """The loss on the validation split; for a mixture, the mean over sources, weighted by their shares of the run."""

    def __init__(
        self, model: LanguageModel, objective: Objective, samples: Mapping[str, Samples], shares: Mapping[str, float],
        *, batch_size: int, limit: int | None, layout: Layout, ranks: Ranks, device: torch.device,
        autocast: AbstractContextManager[Any],
    ) -> None:  # fmt: skip
        """Validates on `limit` samples of each source (None: all), `batch_size` at a time on each device."""
        self.model, self.objective, self.samples, self.shares = model, objective, samples, shares
        self.batch_size, self.limit, self.layout, self.ranks = batch_size, limit, layout, ranks
        self.device, self.autocast = device, autocast
        self.metrics: dict[str, dict[str, float]] = {}
        """The loss and the objective's metrics of each source, at the last validation."""

    def validate(self, give_up: Callable[[], bool]) -> float:
        """The mean loss per counted thing; NaN if `give_up` interrupted it."""
        for name, samples in self.samples.items():
            batches = validation_batches(
                samples, self.batch_size, self.limit, rank=self.layout.dp_rank(self.ranks.rank),
                world_size=self.layout.dp_size,
            )  # fmt: skip
            self.metrics[name] = validate(
                self.model, self.objective, batches, self.device, self.autocast, give_up, self.ranks.sum_tensor
            )
        return self.mean_metrics()["loss"]

    def losses(self) -> dict[str, float]:
        """The loss of each source, at the last validation."""
        return {name: metrics["loss"] for name, metrics in self.metrics.items()}

    def mean_metrics(self) -> dict[str, float]:
        """Means of loss and metrics over the sources, weighted by their shares of the run."""
        names = next(iter(self.metrics.values()), {})
        shares = self.shares.items()
        return {name: sum(share * self.metrics[source][name] for source, share in shares) for name in names}
