"""Hashed n-gram embeddings: the knowledge of an n-gram model for the price of a lookup.

After Huang et al. 2025, "Over-tokenized transformer: vocabulary is generally worth scaling", section 3.2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PRIME = 2**31 - 1
"""Modulus of the hashes, small enough that no product overflows 64 bits."""


def tokens_before(tokens: Tensor, count: int, documents: Tensor | None = None) -> Tensor:
    """The tokens 0, 1, ... `count` - 1 positions before each token; -1 where there is none.

    Args:
        tokens: ids `(batch, seq)`.
        count: how many, the token itself included.
        documents: the document's index for each token `(batch, seq)`; tokens of other documents become -1.

    Returns:
        `(count, batch, seq)`, int64.
    """
    seq = tokens.shape[1]
    before = torch.stack([F.pad(tokens, (shift, 0), value=-1)[:, :seq] for shift in range(count)])
    if documents is None:
        return before
    document_before = torch.stack([F.pad(documents, (shift, 0), value=-1)[:, :seq] for shift in range(count)])
    return torch.where(document_before == documents, before, -1)


def ngram_rows(before: Tensor, lengths: Sequence[int], rows: int, vocab_size: int) -> list[Tensor]:
    """The row of the n-gram that ends at each token, in the embedding table of each length.

    Args:
        before: from `tokens_before`, with the length of the longest n-gram as its count.
        lengths: of the n-grams.
        rows: of each table. With (vocab_size + 2)^length rows or more, no two n-grams share one.
        vocab_size: number of different tokens.

    Returns:
        For each length, row indices `(batch, seq)`, int64.
    """
    base = (vocab_size + 1) | 1  # odd, so that every token of an n-gram reaches the lowest bits of the hash
    hashes = [torch.zeros_like(before[0])]
    for place, token in enumerate(before):
        hashes.append((hashes[-1] + (token + 1) * pow(base, place, PRIME)) % PRIME)
    return [hashes[length] % rows for length in lengths]
