"""Rows of prompts and answers: the prompt, then the answer with the token that ends it, then padding.

Only the answer counts in the loss. A row too long loses the start of its prompt, never a part of its answer, and always
keeps room for one token after the answer, so that a reward model reads the answer's last token. Rows that are compared,
such as a chosen and a rejected answer, lose the same tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAIR = ("chosen", "rejected")
"""Two answers to one prompt, of which the first is better."""
RATED = ("answer", "mismatched")
"""An answer, and the answer to another prompt, with which KTO measures a KL divergence."""


@dataclass(frozen=True)
class Row:
    """The tokens of a prompt and its answer, `(length,)`, and the loss mask of the same shape."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.uint8]

    @property
    def start(self) -> int:
        """The number of tokens in the prompt: those before the first that counts."""
        return int(self.mask.argmax())

    def with_answer(self, other: "Row") -> "Row":
        """This row's prompt with the other's answer."""
        return Row(*(np.concatenate([mine[: self.start], its[other.start :]])
                     for mine, its in ((self.tokens, other.tokens), (self.mask, other.mask))))  # fmt: skip


def joined(prompt: NDArray[np.int64], answer: NDArray[np.int64]) -> Row:
    """A row whose answer counts as a whole."""
    mask = np.concatenate([np.zeros(len(prompt), np.uint8), np.ones(len(answer), np.uint8)])
    return Row(np.concatenate([prompt, answer]), mask)


def fitted(rows: Sequence[Row], row_length: int) -> list[Row] | None:
    """The rows of a group without as many of their first tokens as the longest has too many.

    None: too little would be left of a prompt, whose last token is what the first of the answer follows.
    """
    excess = max(0, max(len(row.tokens) for row in rows) + 1 - row_length)
    if any(row.start - excess < 1 for row in rows):
        return None
    return [Row(row.tokens[excess:], row.mask[excess:]) for row in rows]


def padded(rows: Sequence[Row], row_length: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Tokens and loss mask, both `(rows, row_length)`; padding is token 0 and never counts."""
    tokens, mask = np.zeros((len(rows), row_length), np.int64), np.zeros((len(rows), row_length), np.uint8)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)], mask[number, : len(row.mask)] = row.tokens, row.mask
    return tokens, mask


def mismatched(rows: Sequence[Row], step: int = 1) -> list[list[Row]]:
    """Each row, and its prompt with the answer of the row `step` further on; after the last comes the first."""
    return [[row, row.with_answer(rows[(number + step) % len(rows)])] for number, row in enumerate(rows)]


def per_token(values: Sequence[float], row_length: int, dtype: Any) -> NDArray[Any]:
    """A column with one value per row, at each of the row's tokens: `(rows * row_length,)`."""
    return np.repeat(np.asarray(values, dtype), row_length)


def groups_of(sizes: Mapping[str, int], most: int) -> list[tuple[str, int, int, int]]:
    """Rows of splits, by their `sizes`, in groups of at most so many: the split, the numbers of the first row and of
    the one after the last, and the rows of all splits up to there."""
    done, groups = 0, []
    for split, size in sizes.items():
        for first in range(0, size, most):
            last = min(first + most, size)
            done += last - first
            groups.append((split, first, last, done))
    return groups
