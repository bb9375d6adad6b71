"""A batch: what the model reads, what it should predict, and what else the loss needs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from cleangpt.data.records import cat_rows

IGNORED = -100
"""Target of a position that does not count in the loss."""


@dataclass
class Batch:
    """Samples, one per row: the first dimension of every tensor is the rows."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model's `forward`: `tokens` `(rows, seq)`, int64, and any others that it takes."""
    targets: Tensor
    """The token that follows each position `(rows, seq)`, int64; IGNORED where nothing is learned."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors for the objective, such as advantages `(rows, seq)`; they need no gradient, so they are data."""
    group: int = 1
    """Number of neighbouring rows that must stay together in one micro-batch and on one device, such as 2 for pairs."""

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def num_targets(self) -> int:
        """Targets that are not IGNORED; read it while the batch is on the host, to avoid waiting for a device."""
        return int((self.targets != IGNORED).sum())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with a function applied to each of its tensors."""
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        extras = {name: function(tensor) for name, tensor in self.extras.items()}
        return replace(self, inputs=inputs, targets=function(self.targets), extras=extras)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from pinned memory, copied asynchronously."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The batch in pinned host memory."""
        return self.map(Tensor.pin_memory)

    def rows(self, index: "slice | Tensor") -> "Batch":
        """A selection of its rows."""
        return self.map(lambda tensor: tensor[index])

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` rows; the last may have fewer.

        Raises:
            ValueError: `size` would split a group.
        """
        if size % self.group:
            raise ValueError(f"micro-batches of {size} rows would split groups of {self.group}")
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    @staticmethod
    def cat(batches: Sequence["Batch"]) -> "Batch":
        """The rows of several batches, concatenated; all have the same inputs, extras and group."""
        first = batches[0]
        inputs = {name: cat_rows([batch.inputs[name] for batch in batches]) for name in first.inputs}
        extras = {name: torch.cat([batch.extras[name] for batch in batches]) for name in first.extras}
        return Batch(inputs, torch.cat([batch.targets for batch in batches]), extras, first.group)
