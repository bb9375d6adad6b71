"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"), exact to its released weights.

Learned positions, LayerNorm before attention and MLP, GELU in its tanh form, one matrix for embedding and head.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import Layers, ModelConfig, Width
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import BlockCache, KVCache
from cleangpt.models.layers import attend
from cleangpt.validation import ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """The 124M-parameter GPT-2 has max_seq_len 1024, n_layers 12, n_heads 12, dim 768."""

    n_layers: Layers
    """Blocks, each of attention and MLP."""
    n_heads: Width
    """Attention heads; a divisor of dim."""
    dim: Width
    """Width of the residual stream, in features."""
    bias: bool = True
    """Biases in linear layers and LayerNorms; GPT-2 has them."""
    dropout: ShareBelowOne = 0.0
    """Share of activations dropped in training: embeddings, attention, and both outputs of a block."""


class Attention(nn.Module):
    """Causal self-attention over all heads at once.

    Query, key and value come from one matrix; a head's rows of all three stand together, so that a cut between heads
    is a cut of the matrix. How many heads there are here follows from its rows.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.dim // config.n_heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor, past: BlockCache | None = None) -> Tensor:
        """`(batch, seq, dim)` to the same shape; a position sees itself and those before it, in `past` too."""
        batch, seq, _ = x.shape
        heads = self.qkv(x).view(batch, seq, -1, 3, self.head_dim)
        query, key, value = heads.permute(3, 0, 2, 1, 4)
        if past is not None:
            attended = attend(query, *past.extend(key, value))
        else:
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return F.dropout(projected, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=config.bias)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` to the same shape, each position for itself."""
        hidden = F.gelu(self.up(x), approximate="tanh")
        return F.dropout(self.down(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream after."""

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
    """GPT-2, exact to its released weights: token ids to logits."""

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
    """How each module is cut for tensor parallelism; the words are explained in `distributed/sharding.py`."""

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

    def features(self, tokens: Tensor, *, cache: KVCache | None = None, **modalities: Tensor) -> Tensor:
        """Token ids `(batch, seq)` to `(batch, seq, dim)`; seq is at most `max_seq_len`."""
        past = [None] * len(self.blocks) if cache is None else cache.blocks
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.begin(tokens)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block, kept in zip(self.blocks, past, strict=True):
            x = block(x, kept)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def to_logits(self, features: Tensor) -> Tensor:
        """The head: normalised features `(..., dim)` to logits `(..., vocab)`."""
        return F.linear(features, self.token_embedding.weight)

    def head_parameters(self) -> list[Tensor]:
        """The embedding, which is the head as well."""
        return [self.token_embedding.weight]

    def new_cache(self, rollback_tokens: int = 0) -> KVCache:
        """An empty cache for generation, from which `rollback_tokens` can be taken back."""
        assert self.config.max_seq_len is not None
        return KVCache([None] * self.config.n_layers, self.config.max_seq_len, rollback_tokens)

    def stacked_matrices(self, name: str) -> int:
        """How many matrices the parameter `name` holds, one above the other: query, key and value of each head."""
        return 3 * self.config.n_heads if name.endswith("qkv.weight") else 1

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token: 6 per weight and 12 x layers x dim x seq for attention.

        Chowdhery et al. 2022 (PaLM), appendix B. Positions are looked up, not multiplied, and do not count; the
        embedding counts once, for the head.
        """
        weights = sum(parameter.numel() for parameter in self.parameters()) - self.position_embedding.weight.numel()
        return 6 * weights + 12 * self.config.n_layers * self.config.dim * seq_len

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass without dropout keeps for the backward pass, logits included.

        Per token and layer 16 x dim numbers: the inputs of two norms and of four linear layers (1 + 1 and
        1 + 1 + 1 + 4), query, key and value (3) and the input of GELU (4); a head keeps one number a token more. At
        the end the final norm's input and output (2 x dim) and the log-probabilities (vocab).
        """
        config = self.config
        assert config.vocab_size is not None
        per_layer = 16 * config.dim + config.n_heads + 4
        return 4 * batch * seq_len * (config.n_layers * per_layer + 2 * config.dim + 2 + config.vocab_size)
