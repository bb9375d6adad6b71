"""Documents packed into rows of one length, so that a document that fits is never split.

First-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"): the longest document first, each into the
first row with room for it. It needs at most 11/9 of the minimum number of rows, plus 6/9 of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.writer import Chunk, Groups


def packed(groups: Groups, row_length: int) -> Groups:
    """The groups with their documents packed into rows; each separately, so that a preparation can resume there."""
    for read, chunks in groups:
        yield read, [_packed(chunk, row_length) for chunk in chunks]


def pack(
    documents: Sequence[NDArray[Any]], row_length: int, masks: Sequence[NDArray[Any]] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Rows of tokens and their loss mask, both `(rows, row_length)`, int64 and uint8.

    A longer document is split over several rows. The last document of a row is followed by padding, token 0, which is
    not a target; neither is the first token of a row, which has no context. Of the others, those are targets whose mask
    in `masks`, one array per document, is 1; None: all.
    """
    masks = [np.ones(len(document), np.int64) for document in documents] if masks is None else masks
    cut = [_cut(np.stack(pair), row_length) for pair in zip(documents, masks, strict=True)]
    pieces = sorted((piece for document in cut for piece in document), key=lambda piece: piece.shape[1], reverse=True)
    used = np.zeros(len(pieces), dtype=np.int64)
    rows: list[list[NDArray[Any]]] = []
    for piece in pieces:
        row = int(np.argmax(used[: len(rows) + 1] <= row_length - piece.shape[1]))
        used[row] += piece.shape[1]
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
    packed = np.zeros((2, len(rows), row_length), dtype=np.int64)
    for row, inside in enumerate(rows):
        packed[:, row, : used[row]] = np.concatenate(inside, axis=1)
    packed[1, :, 0] = 0
    return packed[0], packed[1].astype(np.uint8)


def _packed(chunk: Chunk, row_length: int) -> Chunk:
    documents = np.split(chunk.tokens, np.cumsum(chunk.lengths))
    tokens, mask = pack(documents, row_length)
    return replace(
        chunk, tokens=tokens.reshape(-1), mask=mask.reshape(-1), lengths=np.full(len(tokens), row_length, np.int64)
    )


def _cut(document: NDArray[Any], length: int) -> Iterator[NDArray[Any]]:
    """A document `(2, tokens)`, tokens and mask, in parts of at most `length` tokens."""
    return (document[:, start : start + length] for start in range(0, document.shape[1], length))
