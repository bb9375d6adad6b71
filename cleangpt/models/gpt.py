"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"), exact to its released weights.

Learned position embeddings, pre-LayerNorm blocks, tanh GELU, embedding and head tied.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import Layers, ModelConfig, Width
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import BlockCache, KVCache
from cleangpt.models.layers import attention
from cleangpt.validation import ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """GPT-2 with 124M parameters has max_seq_len 1024, n_layers 12, n_heads 12, dim 768."""

    n_layers: Layers
    """Blocks, each of attention and MLP."""
    n_heads: Width
    """Attention heads; a divisor of dim."""
    dim: Width
    """Width of the residual stream."""
    bias: bool = True
    """Biases in linear layers and LayerNorms; GPT-2 has them."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability in training: of embeddings, attention weights, and the outputs of attention and MLP."""


class Attention(nn.Module):
    """Causal multi-head self-attention.

    One matrix projects to queries, keys and values. The rows of a head's three are adjacent, so that sharding the
    matrix by rows shards it by heads; the number of heads on this device follows from its rows.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.dim // config.n_heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor, past: BlockCache | None = None) -> Tensor:
        """`(batch, seq, dim)` to the same shape; each position attends to itself and all before, in `past` too."""
        batch, seq, _ = x.shape
        heads = self.qkv(x).view(batch, seq, -1, 3, self.head_dim)
        query, key, value = heads.permute(3, 0, 2, 1, 4)
        if past is not None:
            attended = attention(query, *past.extend(key, value))
        else:
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return F.dropout(projected, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a hidden width of 4 x dim."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=config.bias)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` to the same shape, position by position."""
        hidden = F.gelu(self.up(x), approximate="tanh")
        return F.dropout(self.down(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each with a norm before it, added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: BlockCache | None = None) -> Tensor:
        """`(batch, seq, dim)` to the same shape."""
        x = x + self.attention(self.attention_norm(x), past)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class GPT(LanguageModel):
    """GPT-2: token ids to logits."""

    tensor_plan: ClassVar[dict[str, str]] = {
        "token_embedding": "vocabulary",
        "position_embedding": "positions",
        "blocks.*.attention_norm": "sequence",
        "blocks.*.attention.qkv": "column",
        "blocks.*.attention.out": "row",
        "blocks.*.mlp_norm": "sequence",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "final_norm": "sequence",
    }
    deferred_init: ClassVar[bool] = True
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None and config.max_seq_len is not None
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.reset_parameters()

    def layers(self) -> nn.ModuleList:
        """All blocks."""
        return self.blocks

    def features(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Token ids `(batch, seq)` to features `(batch, seq, dim)`; seq is at most `max_seq_len`."""
        past = [None] * len(self.blocks) if cache is None else cache.blocks
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.begin(tokens)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block, block_cache in zip(self.blocks, past, strict=True):
            x = block(x, block_cache)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def to_logits(self, features: Tensor) -> Tensor:
        """Features `(..., dim)` to logits `(..., vocab)`, by the transposed embedding."""
        return F.linear(features, self.token_embedding.weight)

    def head_parameters(self) -> list[Tensor]:
        """The embedding, which is tied to the head."""
        return [self.token_embedding.weight]

    def new_cache(self, rollback_tokens: int = 0) -> KVCache:
        """An empty cache for generation that can forget its last `rollback_tokens` tokens."""
        assert self.config.max_seq_len is not None
        return KVCache([None] * self.config.n_layers, self.config.max_seq_len, rollback_tokens)

    def attention_heads(self) -> dict[str, int]:
        """The number of heads."""
        return {"n_heads": self.config.n_heads}

    def stacked_matrices(self, name: str) -> int:
        """3 per head in `qkv.weight`, else 1."""
        return 3 * self.config.n_heads if name.endswith("qkv.weight") else 1

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token: 6 per weight and 12 x layers x dim x seq for attention.

        Chowdhery et al. 2022 (PaLM), appendix B. Position embeddings are looked up, not multiplied, and do not count;
        token embeddings count once, as the head.
        """
        weights = sum(parameter.numel() for parameter in self.parameters()) - self.position_embedding.weight.numel()
        return 6 * weights + 12 * self.config.n_layers * self.config.dim * seq_len

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass without dropout saves for the backward pass, logits included.

        Per token and layer 16 x dim numbers: the inputs of two norms and of four linear layers (1 + 1 and
        1 + 1 + 1 + 4), query, key and value (3) and the input of GELU (4); and one per head. At the end, the final
        norm's input and output (2 x dim) and the log-probabilities (vocab).
        """
        config = self.config
        assert config.vocab_size is not None
        per_layer = 16 * config.dim + config.n_heads + 4
        return 4 * batch * seq_len * (config.n_layers * per_layer + 2 * config.dim + 2 + config.vocab_size)
