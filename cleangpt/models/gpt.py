"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"), exact to its released weights.

Learned position embeddings, pre-LayerNorm blocks, tanh GELU, embedding and head tied. Fields whose defaults are GPT-2's
make it one of its relatives, such as Cerebras-GPT.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import Layers, ModelConfig, Width
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import BlockCache, KVCache
from cleangpt.models.layers import MLP, attention
from cleangpt.models.vision import VisionConfig, build_vision
from cleangpt.validation import Positive, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """GPT-2 with 124M parameters has max_seq_len 1024, n_layers 12, n_heads 12, dim 768."""

    n_layers: Layers
    """Blocks, each of attention and MLP."""
    n_heads: Width
    """Attention heads; a divisor of dim."""
    dim: Width
    """Width of the residual stream."""
    hidden_dim: Width | None = None
    """Hidden width of the MLP; None: 4 x dim."""
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    """Of the MLP; GPT-2 approximates GELU by tanh, Cerebras-GPT does not."""
    norm_eps: Positive = 1e-5
    """Epsilon of LayerNorm, added to the variance."""
    tied: bool = True
    """Tie embedding and head: one matrix for both."""
    bias: bool = True
    """Biases in linear layers and LayerNorms, but not in the head; GPT-2 has them."""
    scale_attention: bool = True
    """Divide attention scores by the square root of the size of a head."""
    scale_attention_by_layer: bool = False
    """Divide the attention scores of the n-th block by n as well (Karamcheti et al. 2021, "Mistral")."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability in training: of embeddings, attention weights, and the outputs of attention and MLP."""
    vision: VisionConfig = VisionConfig()  # noqa: RUF009 - frozen
    """How the model reads images, if it does."""

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return self.hidden_dim or 4 * self.dim


class Attention(nn.Module):
    """Causal multi-head self-attention.

    One matrix projects to queries, keys and values. The rows of a head's three are adjacent, so that sharding the
    matrix by rows shards it by heads; the number of heads on this device follows from its rows.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.dim // config.n_heads, config.dropout
        self.scale = None if config.scale_attention else 1.0
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(
        self, x: Tensor, past: BlockCache | None = None, divisor: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """`(batch, seq, dim)` to the same shape; each position attends to itself and all before, in `past` too, unless
        a `mask` says otherwise; a `divisor`, 0-dim, divides the scores."""
        batch, seq, _ = x.shape
        query, key, value = self.qkv(x).view(batch, seq, -1, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        query = query if divisor is None else query / divisor
        if past is not None:
            key, value, mask = past.extend(key, value)
        attended = attention(query, key, value, mask, self.dropout if self.training else 0.0, self.scale)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each with a norm before it, added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config.dim, config.mlp_size, gated=False, activation=config.activation, bias=config.bias)

    def forward(
        self, x: Tensor, past: BlockCache | None = None, divisor: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """`(batch, seq, dim)` to the same shape; for the arguments, see `Attention`."""
        attended = self.attention(self.attention_norm(x), past, divisor, mask)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class GPT(LanguageModel):
    """GPT-2: token ids to logits."""

    tensor_plan: ClassVar[dict[str, str]] = {
        "token_embedding": "vocabulary",
        "position_embedding": "positions",
        "vision": "replicated",
        "blocks.*.attention_norm": "sequence",
        "blocks.*.attention.qkv": "column",
        "blocks.*.attention.out": "row",
        "blocks.*.mlp_norm": "sequence",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "final_norm": "sequence",
        "head": "logits",
    }
    deferred_init: ClassVar[bool] = True
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None and config.max_seq_len is not None
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.dim)
        self.vision = build_vision(config.vision, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def layers(self) -> nn.ModuleList:
        """All blocks."""
        return self.blocks

    def features(
        self, tokens: Tensor, *, images: Tensor | None = None, images_ends: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids `(batch, seq)`, at most `max_seq_len`, to features `(batch, seq, dim)`; images: see `Vision`."""
        past = [None] * len(self.blocks) if cache is None else cache.blocks
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.begin(tokens)
        x, masks = self.token_embedding(tokens), {None: None} if cache is None else cache.masks
        if self.vision is not None:
            x = self.vision(x, images, images_ends)
            self.vision.open_masks(masks, images_ends, tokens, cache)
        x = F.dropout(x + self.position_embedding(positions), self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            divisor = positions.new_full((), layer + 1) if self.config.scale_attention_by_layer else None
            x = block(x, past[layer], divisor, masks[None])
        return self.final_norm(x)  # type: ignore[no-any-return]

    def to_logits(self, features: Tensor) -> Tensor:
        """Features `(..., dim)` to logits `(..., vocab)`."""
        return F.linear(features, self.token_embedding.weight) if self.head is None else self.head(features)

    def head_parameters(self) -> list[Tensor]:
        """The head's matrix, or the embedding's where they are tied."""
        return [self.token_embedding.weight if self.head is None else self.head.weight]

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

        Chowdhery et al. 2022 (PaLM), appendix B. Embeddings are looked up and do not count, except as a tied head.
        """
        looked_up = [self.position_embedding] if self.head is None else [self.position_embedding, self.token_embedding]
        weights = sum(parameter.numel() for parameter in self.parameters())
        weights -= sum(embedding.weight.numel() for embedding in looked_up)
        return 6 * weights + 12 * self.config.n_layers * self.config.dim * seq_len

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass without dropout saves for the backward pass, logits included.

        Per token and layer: the inputs of two norms and of three linear layers, query, key and value (8 x dim), input
        and output of the activation function (2 x hidden width), and one number per head. At the end, the final norm's
        input and output (2 x dim) and the log-probabilities (vocab).
        """
        config = self.config
        assert config.vocab_size is not None
        per_layer = 8 * config.dim + 2 * config.mlp_size + config.n_heads + 4
        return 4 * batch * seq_len * (config.n_layers * per_layer + 2 * config.dim + 2 + config.vocab_size)
