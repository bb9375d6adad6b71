"""Layers that architectures share: attention and its masks, rotary positions, the MLP.

A mask says which tokens each token attends to. On CUDA devices, FlexAttention (Dong et al. 2024, "Flex attention: a
programming model for generating optimized attention kernels") skips blocks of the mask that are empty, so that a
sample of many short documents costs what the documents cost, and a sliding window what it sees.
"""

import math
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.models.gelu import gelu_tanh

if TYPE_CHECKING:  # it imports PyTorch's compiler, which takes longer than all other imports here
    from torch.nn.attention.flex_attention import BlockMask

AttentionMask: TypeAlias = "Tensor | BlockMask | None"
"""True where a query attends to a key: bool, or blocks of it; None: causal, each token and all before it."""


# Attention ------------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention; groups of query heads may share a head of keys and values (GQA).

    Args:
        query: of all tokens, or of the last one only `(batch, heads, seq, head_dim)`.
        key: of all tokens `(batch, kv_heads, total, head_dim)`; kv_heads divides heads.
        value: as `key`.
        mask: broadcast to `(batch, heads, seq, total)`; None: causal.
        dropout: probability of dropping an attention weight; not with FlexAttention's blocks.
        scale: factor on the products of queries and keys; None: 1 / sqrt(head_dim).

    Returns:
        `(batch, heads, seq, head_dim)`.
    """
    if mask is not None and not isinstance(mask, Tensor):
        return flex_attention(query.is_cuda)(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    if query.shape[2] > 1:
        shared = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=shared
        )
    # With a single query per head, the heads that share a key become its sequence, so that no key is copied.
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scale).reshape_as(query)


@cache
def flex_attention(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention. Uncompiled it computes every pair of tokens, so that tests can compare it on a CPU."""
    from torch.nn.attention import flex_attention as flex

    return cast(Callable[..., Tensor], torch.compile(flex.flex_attention) if compiled else flex.flex_attention)


# Masks ----------------------------------------------------------------------------------------------------------------


def attention_masks(
    tokens: Tensor, windows: Collection[int | None], separator: int | None
) -> dict[int | None, AttentionMask]:
    """The mask for each sliding window, where attention does not cross the end of a document.

    Args:
        tokens: ids `(batch, seq)`.
        windows: tokens that a token attends to, itself included; None: all before it.
        separator: id of the token that ends a document; None: attention crosses documents.
    """
    seq = tokens.shape[1]
    documents = None if separator is None else document_ids(tokens, separator)
    limits = {window: window if window and seq > window else None for window in windows}
    if tokens.is_cuda:
        return {window: block_mask(documents, limit, seq, tokens.device) for window, limit in limits.items()}
    within_documents = None if documents is None else document_mask(documents)
    positions = torch.arange(seq, device=tokens.device)
    within_windows = {window: window_mask(positions, limit) if limit else None for window, limit in limits.items()}
    return {window: and_masks(within_documents, mask) for window, mask in within_windows.items()}


def window_mask(positions: Tensor, window: int) -> Tensor:
    """The mask `(seq, seq)`, bool, of a sliding window at `positions` `(seq,)`: itself and the `window` - 1 before."""
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def document_ids(tokens: Tensor, separator: int) -> Tensor:
    """The document's index for each of `tokens` `(batch, seq)`, int64; a separator belongs to the document it ends."""
    ends = (tokens == separator).long()
    return ends.cumsum(-1) - ends


def document_mask(documents: Tensor) -> Tensor:
    """The causal mask `(batch, 1, seq, seq)`, bool, within `documents` `(batch, seq)` from `document_ids`."""
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def and_masks(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The intersection of two masks; None: causal."""
    return other if one is None else one if other is None else one & other


def block_mask(documents: Tensor | None, window: int | None, seq: int, device: torch.device) -> "BlockMask | None":
    """`document_mask` and `window_mask`, where there are documents and a window, as FlexAttention's blocks.

    Args:
        documents: `(batch, seq)` from `document_ids`; None: one.
        window: tokens that a token attends to, itself included; None: all before it.
        seq: tokens in a sample.
        device: of the queries.

    Returns:
        None without documents and window: causal, for which there are faster kernels.
    """
    if documents is None and window is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    def attends(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        return seen if documents is None else seen & (documents[sample, query] == documents[sample, key])

    return create_block_mask(attends, None if documents is None else len(documents), None, seq, seq, device=str(device))


# Rotary positions -----------------------------------------------------------------------------------------------------


def rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians per token `(head_dim / 2,)`, float32, of each pair of features (Su et al. 2021, "RoFormer", 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1 / theta**exponents


def scale_rope(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_seq_len: int
) -> Tensor:
    """Rotary frequencies for a longer context, as in Llama 3.1: long wavelengths are stretched by `factor`.

    Args:
        frequencies: from `rope_frequencies`.
        factor: by how much wavelengths are stretched.
        low_freq_factor: wavelengths above original_seq_len / low_freq_factor are stretched in full.
        high_freq_factor: wavelengths below original_seq_len / high_freq_factor stay; those between, in part.
        original_seq_len: context length, in tokens, that the model was trained with first.
    """
    turns = original_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rope_cos_sin(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine `(2, ..., seq, 1, head_dim / 2)`, float32, of the angles at `positions` `(..., seq)`."""
    angles = positions.float()[..., None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])[..., None, :]


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates feature i with feature i + head_dim / 2 of `x` `(batch, seq, heads, head_dim)`; the shape stays.

    Computed in float32, returned in the dtype of `x`. The pairs are those of Hugging Face's weights. Su et al. 2021,
    equation 34, pairs neighbors, which is the same up to the order of features within a head.
    """
    cos, sin = cos_sin.float()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


# The MLP --------------------------------------------------------------------------------------------------------------

Activation: TypeAlias = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
"""Activation functions by name: GELU (Hendrycks and Gimpel 2016) exact, approximated by tanh, as in GPT-2, and by the
logistic function, as in CLIP; ReLU; its square (So et al. 2021, "Primer"); SiLU, also called Swish."""


def mlp_activation(gate: Tensor | None, up: Tensor, activation: Activation = ACTIVATIONS["relu2"]) -> Tensor:
    """SwiGLU of the gate and up projections (Shazeer 2020); without a gate, an activation function. Same shape."""
    return activation(up) if gate is None else F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, "GLU variants improve transformer", equation 6), or without a gate two linear layers with
    an activation function between them."""

    def __init__(
        self, dim: int, hidden_dim: int, gated: bool = True, activation: str = "relu2", bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(dim, hidden_dim, bias=bias) if gated else None
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` to the same shape, position by position."""
        gate = None if self.gate is None else self.gate(x)
        return self.down(mlp_activation(gate, self.up(x), self.activation))  # type: ignore[no-any-return]
