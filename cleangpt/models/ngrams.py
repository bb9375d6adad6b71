"""Embeddings of the last few tokens together, found by a hash: what an n-gram model knows, for the price of a lookup.

After Huang et al. 2025, "Over-tokenized transformer: vocabulary is generally worth scaling", section 3.2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PRIME = 2**31 - 1
"""Hashes stay below it, so that none overflows 64 bits on the way."""


def tokens_before(tokens: Tensor, count: int, documents: Tensor | None = None) -> Tensor:
    """The tokens that stand 0, 1, ... `count` - 1 places before each of `tokens` `(batch, seq)`; -1 where none does.

    Args:
        tokens: ids.
        count: how many, each token itself among them.
        documents: of each token `(batch, seq)`; what stands in another document counts as none.

    Returns:
        `(count, batch, seq)`, int64.
    """
    seq = tokens.shape[1]
    before = torch.stack([F.pad(tokens, (places, 0), value=-1)[:, :seq] for places in range(count)])
    if documents is None:
        return before
    theirs = torch.stack([F.pad(documents, (places, 0), value=-1)[:, :seq] for places in range(count)])
    return torch.where(theirs == documents, before, -1)


def ngram_rows(before: Tensor, lengths: Sequence[int], rows: int, vocab_size: int) -> list[Tensor]:
    """The row of the n-gram that ends at each token, in a table of so many rows for each length.

    Args:
        before: from `tokens_before`, as many as the longest n-gram has.
        lengths: of the n-grams.
        rows: of a table. With (vocab_size + 2)^length or more of them, no two n-grams share one.
        vocab_size: kinds of token.

    Returns:
        For each length `(batch, seq)`, int64, below `rows`.
    """
    base = (vocab_size + 1) | 1  # odd, so that every token of an n-gram reaches the lowest bits of the hash
    hashes = [torch.zeros_like(before[0])]
    for place, token in enumerate(before):
        hashes.append((hashes[-1] + (token + 1) * pow(base, place, PRIME)) % PRIME)
    return [hashes[length] % rows for length in lengths]
