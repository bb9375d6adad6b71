"""What attention may see, and attention over it: windows and documents, as a mask or as blocks of one.

A mask says of every pair of tokens whether the first sees the second. On CUDA devices FlexAttention (Dong et al. 2024,
"Flex attention: a programming model for generating optimized attention kernels") skips the blocks in which no pair is
seen, so that a sample of many short documents costs what its documents cost.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # it takes PyTorch's compiler with it, which takes longer to load than all else here
    from torch.nn.attention.flex_attention import BlockMask

Seen: TypeAlias = "Tensor | BlockMask | None"
"""What each token sees: a mask, blocks of one, or none for itself and all before it."""


@cache
def flex_attention(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention. Where it is not compiled, it computes all pairs; so the tests compare it on a CPU."""
    from torch.nn.attention import flex_attention as flex

    return cast(Callable[..., Tensor], torch.compile(flex.flex_attention) if compiled else flex.flex_attention)


def window_mask(positions: Tensor, window: int) -> Tensor:
    """Which of `positions` `(seq,)` each may see `(seq, seq)`, bool: itself and the `window` - 1 before it."""
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def document_ids(tokens: Tensor, separator: int) -> Tensor:
    """The document of each of `tokens` `(batch, seq)`, in the same shape, int64; a separator ends the one it is in."""
    ends = (tokens == separator).long()
    return ends.cumsum(-1) - ends


def document_mask(documents: Tensor) -> Tensor:
    """Which tokens each may see: itself and those before it in its document.

    Args:
        documents: of each token `(batch, seq)`, from `documents_of`.

    Returns:
        `(batch, 1, seq, seq)`, bool.
    """
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What two masks both allow; none: itself and all before it."""
    return other if one is None else one if other is None else one & other


def document_blocks(documents: Tensor, window: int | None = None) -> "BlockMask":
    """`document_mask` of whole samples `(batch, seq)` in FlexAttention's form, within a window where there is one."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, seq = documents.shape

    def sees(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (documents[sample, query] == documents[sample, key]) & (key <= query)
        return same if window is None else same & (query - key < window)

    return create_block_mask(sees, batch, None, seq, seq, device=str(documents.device))


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen) -> Tensor:
    """Attention of queries `(batch, heads, seq, head_dim)`; of keys and values, a divisor of as many heads.

    Args:
        query: of all tokens, or of the last one alone.
        key: of all tokens `(batch, kv_heads, seen, head_dim)`.
        value: likewise.
        seen: what each query sees; none: itself and all before it.

    Returns:
        `(batch, heads, seq, head_dim)`.
    """
    if seen is not None and not isinstance(seen, Tensor):
        return flex_attention(query.is_cuda)(query, key, value, block_mask=seen, enable_gqa=True)
    if query.shape[2] > 1:
        causal = seen is None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal, enable_gqa=True)
    # One query for each head: those that share a key stand in a row as if they were tokens, so that no key is copied.
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen).reshape_as(query)
