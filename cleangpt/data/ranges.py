"""Parts of a stream that a run skips."""

from collections.abc import Sequence

Ranges = Sequence[Sequence[int]]
"""Positions of a stream: pairs of the first and the one after the last, in order, with gaps between."""


def add_range(ranges: Ranges, start: int, end: int) -> list[list[int]]:
    """The ranges with another one, which may overlap them."""
    merged: list[list[int]] = []
    for first, last in sorted([*map(tuple, ranges), (start, end)]):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def without_ranges(position: int, ranges: Ranges) -> int:
    """The position in a stream of the sample at a position among those that are in none of the ranges."""
    for start, end in ranges:
        if position < start:
            break
        position += end - start
    return position
