"""Rows of numbers of different lengths in one array, so that a step over a batch is a few operations on arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ragged:
    """Rows of numbers that grow at their ends.

    Args:
        rows: the numbers of each row; may be empty.
        dtype: of the numbers.
    """

    def __init__(self, rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> None:
        self.lengths: NDArray[np.int64] = np.array([len(row) for row in rows], np.int64)
        """Numbers in each row."""
        self._values: NDArray[Any] = np.zeros((len(rows), 2 * self.longest + 1), dtype)
        for place, row in enumerate(rows):
            self._values[place, : len(row)] = row

    @property
    def longest(self) -> int:
        """The largest of the lengths."""
        return int(self.lengths.max(initial=0))

    def row(self, place: int, count: int | None = None) -> list[Any]:
        """A row, or its last `count` numbers."""
        end = int(self.lengths[place])
        numbers: list[Any] = self._values[place, 0 if count is None else end - count : end].tolist()
        return numbers

    def last(self, count: int) -> NDArray[Any]:
        """The last `count` numbers of each row `(rows, count)`; none may be shorter."""
        places = self.lengths[:, None] + np.arange(-count, 0)
        numbers: NDArray[Any] = self._values[np.arange(len(places))[:, None], places]
        return numbers

    def padded(self) -> NDArray[Any]:
        """All rows, zeros after the end of each `(rows, longest)`."""
        values = self._values[:, : self.longest]
        return np.where(np.arange(values.shape[1]) < self.lengths[:, None], values, 0)

    def append(self, numbers: Sequence[float] | NDArray[Any]) -> None:
        """Adds one number to each row."""
        width = self._values.shape[1]
        if self.longest == width:
            self._values = np.pad(self._values, ((0, 0), (0, width)))
        self._values[np.arange(len(self.lengths)), self.lengths] = numbers
        self.lengths = self.lengths + 1

    def drop(self, count: int) -> None:
        """Removes the last `count` numbers of each row."""
        self.lengths = self.lengths - count

    def select(self, places: Sequence[int] | NDArray[np.int64]) -> None:
        """Keeps these rows, in this order; one named twice is copied."""
        self.lengths, self._values = self.lengths[places], self._values[places]

    def join(self, other: "Ragged") -> None:
        """Adds the rows of another."""
        width = max(self._values.shape[1], other._values.shape[1])
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (self._values, other._values)]
        self._values, self.lengths = np.concatenate(parts), np.concatenate([self.lengths, other.lengths])
