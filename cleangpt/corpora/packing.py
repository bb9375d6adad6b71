"""Documents packed whole into rows of one length, so that no sample begins or ends within a document that fits.

First-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"): the longest document first, each into the
first row with room for it. It needs at most 11/9 of the fewest rows that would do, and 6/9 of a row.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.corpora.preparation import Chunk, Groups


def packed(groups: Groups, row_length: int) -> Groups:
    """The same groups with their documents in rows; each group is packed by itself, so that it can be resumed at."""
    for read, chunks in groups:
        yield read, [_packed(chunk, row_length) for chunk in chunks]


def pack(documents: list[NDArray[Any]], row_length: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Rows of tokens and their loss mask, both `(rows, row_length)`, int64 and uint8.

    A longer document is cut into rows. What follows the last document of a row is padding, token 0, and no target; nor
    is the first token of a row, which nothing stands before.
    """
    pieces = sorted((piece for document in documents for piece in _cut(document, row_length)), key=len, reverse=True)
    used = np.zeros(len(pieces), dtype=np.int64)
    rows: list[list[NDArray[Any]]] = []
    for piece in pieces:
        row = int(np.argmax(used[: len(rows) + 1] <= row_length - len(piece)))
        used[row] += len(piece)
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
    tokens = np.zeros((len(rows), row_length), dtype=np.int64)
    for row, inside in enumerate(rows):
        tokens[row, : used[row]] = np.concatenate(inside)
    places = np.arange(row_length)
    mask = (places < used[: len(rows), None]) & (places > 0)
    return tokens, mask.astype(np.uint8)


def _packed(chunk: Chunk, row_length: int) -> Chunk:
    documents = np.split(chunk.tokens, np.cumsum(chunk.lengths))
    tokens, mask = pack(documents, row_length)
    return replace(
        chunk, tokens=tokens.reshape(-1), mask=mask.reshape(-1), lengths=np.full(len(tokens), row_length, np.int64)
    )


def _cut(document: NDArray[Any], length: int) -> Iterator[NDArray[Any]]:
    return (document[start : start + length] for start in range(0, len(document), length))
