"""Ranges of a stream that a run skips, and samples that stay together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ranges = Sequence[Sequence[int]]
"""Ranges of positions of a stream, (first, last + 1), in order and with gaps between them."""


def add_range(ranges: Ranges, start: int, end: int) -> list[list[int]]:
    """Adds a range to the ranges, merging those that overlap or touch."""
    merged: list[list[int]] = []
    for first, last in sorted([*map(tuple, ranges), (start, end)]):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def without_ranges(position: int, ranges: Ranges) -> int:
    """Converts a position that does not count skipped samples to a position in the stream."""
    for start, end in ranges:
        if position < start:
            break
        position += end - start
    return position


def with_members(groups: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The samples `(groups * size,)` of groups of neighbours `(groups,)`, such as pairs."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)
