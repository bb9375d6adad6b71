"""Llama 3 (Dubey et al. 2024, "The Llama 3 herd of models") and its relatives, exact to their released weights.

Rotary position embeddings (Su et al. 2021), RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020), grouped-query
attention (Ainslie et al. 2023). Fields that are off by default make it Mistral, Mixtral, Qwen 2 or Qwen 3, or add parts
of other models. More than 400 lines, since an architecture is read in one file, of which the configuration is a third.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import Layers, ModelConfig, Width
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import BlockCache, KVCache
from cleangpt.models.layers import (
    MLP,
    AttentionMask,
    apply_rope,
    attention,
    attention_masks,
    document_ids,
    rope_cos_sin,
    rope_frequencies,
    scale_rope,
)
from cleangpt.models.moe import MixtureOfExperts
from cleangpt.models.ngrams import ngram_rows, tokens_before
from cleangpt.models.vision import VisionConfig, build_vision
from cleangpt.validation import Bounds, Count, ShareBelowOne

Scale = Annotated[float, Bounds(above=0, most=1e30)]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama 3 8B has n_layers 32, n_heads 32, n_kv_heads 8, dim 4096, hidden_dim 14336, vocab_size 128256."""

    n_layers: Layers
    """Blocks, each of attention and MLP."""
    n_heads: Width
    """Query heads."""
    n_kv_heads: Width | None = None
    """Key and value heads, a divisor of n_heads; None: n_heads."""
    head_dim: Annotated[int, Bounds(2, 2**20, even=True)] | None = None
    """Size of a head, an even number; None: dim / n_heads."""
    dim: Width
    """Width of the residual stream."""
    hidden_dim: Annotated[int, Bounds(1, 2**24)] | None = None
    """Hidden width of the MLP; None: 8/3 dim rounded up to a multiple of 64, for relu2 4 dim."""
    norm_eps: Scale = 1e-5
    """Epsilon of RMSNorm, added to the mean square."""
    tied: bool = False
    """Tie embedding and head: one matrix for both."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections; Qwen 2 has them."""
    qk_norm: bool = False
    """RMSNorm of queries and keys over each head (Henry et al. 2020); Qwen 3 has it."""
    sliding_window: Count | None = None
    """Tokens that a token attends to, itself included (Beltagy et al. 2020); None: all before it."""
    global_every: Count | None = None
    """With a sliding window, every n-th block attends globally; None: no block does."""
    rope_theta: Scale = 500_000.0
    """Base of the rotary wavelengths; the longest is nearly 2 pi rope_theta tokens."""
    rope_factor: Annotated[float, Bounds(1)] | None = None
    """Factor by which long wavelengths are stretched for a longer context, 8 in Llama 3.1; None: no stretching."""
    rope_low_freq_factor: Scale = 1.0
    """Wavelengths above rope_original_seq_len / rope_low_freq_factor are stretched in full."""
    rope_high_freq_factor: Scale = 4.0
    """Wavelengths below rope_original_seq_len / rope_high_freq_factor stay; those between are stretched in part."""
    rope_original_seq_len: Count = 8192
    """Context length before it was extended, in tokens."""
    n_experts: Layers | None = None
    """Number of experts that replace each MLP; None: a dense model."""
    experts_per_token: Count = 2
    """Experts that each token is routed to."""
    expert_hidden_dim: Annotated[int, Bounds(1, 2**24)] | None = None
    """Hidden width of an expert; None: hidden_dim."""
    n_shared_experts: Annotated[int, Bounds(0, 4096)] = 0
    """Experts that every token goes through as well, computed as one MLP of their total width."""
    normalize_router_weights: bool = True
    """Normalize the router weights of a token's experts to a sum of 1."""
    bias_update_rate: Scale | None = None
    """How much a step changes the router bias of an expert that got too many or too few tokens (Wang et al. 2024,
    "Auxiliary-loss-free load balancing strategy for mixture-of-experts", algorithm 1, which uses 0.001); None: no
    biases."""
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """In MLP and experts: swiglu, with three matrices, or the square of ReLU (So et al. 2021, "Primer"), with two."""
    value_residual: bool = False
    """Every block but the first averages its values with those of the first (Zhou et al. 2024, "Value residual
    learning", ResFormer with both factors fixed at 1/2)."""
    logit_soft_cap: Scale | None = None
    """Logits become logit_soft_cap x tanh(logits / logit_soft_cap) (Gemma Team 2024, "Gemma 2", section 2, which uses
    30); None: no cap."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability in training, after embedding, attention and MLP (Srivastava et al. 2014)."""
    ngrams: tuple[int, ...] = ()
    """Lengths, such as 2 and 3, of n-grams whose embeddings are added to that of their last token (Huang et al. 2025,
    "Over-tokenized transformer")."""
    ngram_rows: Count = 16384
    """Rows of the embedding table of each length; n-grams are hashed to rows, so that some share one."""
    ngram_dropout: ShareBelowOne = 0.0
    """Dropout probability of n-gram embeddings in training; keeps them from memorizing the text over several
    epochs."""
    separator: Annotated[int, Bounds(0)] | None = None
    """Id of the token that ends a document; attention does not cross it (Dubey et al. 2024, section 3.2). None: no
    limit. Positions do not restart, since only their differences matter."""
    vision: VisionConfig = VisionConfig()  # noqa: RUF009 - frozen
    """How the model reads images, if it does."""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def expert_size(self) -> int:
        """Hidden width of an expert."""
        return self.expert_hidden_dim or self.mlp_size

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP; with a gate, 8/3 dim gives as many weights as 4 dim without one."""
        derived = -(-8 * self.dim // (3 * 64)) * 64 if self.gated else 4 * self.dim
        return derived if self.hidden_dim is None else self.hidden_dim

    def resolved(self, vocab_size: int, seq_len: int) -> "LlamaConfig":
        """The same configuration with the fields filled in that are left open."""
        return replace(super().resolved(vocab_size, seq_len), hidden_dim=self.mlp_size)

    @property
    def gated(self) -> bool:
        """Whether MLP and experts have a gate."""
        return self.activation == "swiglu"

    @property
    def has_masks(self) -> bool:
        """Whether attention is limited to documents or windows."""
        return self.separator is not None or self.sliding_window is not None

    def window(self, layer: int) -> int | None:
        """Tokens that a token attends to in block `layer`, counted from 0; None: all before it."""
        is_global = self.global_every is not None and (layer + 1) % self.global_every == 0
        return None if is_global else self.sliding_window

    def windows(self) -> list[int | None]:
        """The window of each block."""
        return [self.window(layer) for layer in range(self.n_layers)]

    def rope_frequencies(self, device: torch.device) -> Tensor:
        """Radians per token `(head_size / 2,)`, float32, of each pair of features."""
        frequencies = rope_frequencies(self.head_size, self.rope_theta, device)
        if self.rope_factor is None:
            return frequencies
        return scale_rope(
            frequencies, self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor,
            self.rope_original_seq_len,
        )  # fmt: skip

    def check_fit(self) -> None:
        """Checks that the fields fit together.

        Raises:
            UserError: one line naming the field, its value and what is allowed.
        """
        n_heads, n_experts, vocab_size = self.n_heads, self.n_experts, self.vocab_size
        if n_heads % self.num_kv_heads:
            raise self._misfit("n_kv_heads", f": a divisor of model.n_heads, which is {n_heads}")
        if self.head_dim is None and self.dim % (2 * n_heads):
            raise self._misfit("dim", f" without model.head_dim: an even multiple of model.n_heads, which is {n_heads}")
        if n_experts is not None and self.experts_per_token > n_experts:
            raise self._misfit("experts_per_token", f": at most model.n_experts, which is {n_experts}")
        if n_experts is None and self.bias_update_rate is not None:
            raise self._misfit("bias_update_rate", " without model.n_experts: None")
        if any(not 2 <= length <= 16 for length in self.ngrams) or len(set(self.ngrams)) < len(self.ngrams):
            raise self._misfit("ngrams", ": different whole numbers from 2 to 16")
        if self.separator is not None and vocab_size is not None and self.separator >= vocab_size:
            raise self._misfit("separator", f": less than model.vocab_size, which is {vocab_size}")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise self._misfit(
                "rope_low_freq_factor",
                f": less than model.rope_high_freq_factor, which is {self.rope_high_freq_factor}",
            )

    def _misfit(self, field: str, allowed: str) -> UserError:
        return UserError(f"model.{field} is {vars(self)[field]}; allowed{allowed}")


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions.

    The number of heads on this device follows from the rows of the matrices, so that these can be sharded by heads.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = head_dim = config.head_size
        self.query = nn.Linear(config.dim, config.n_heads * head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.dim, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.dim, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_heads * head_dim, config.dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask = None,
        first_value: Tensor | None = None,
        past: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(batch, seq, dim)` to the same shape, and the values of all heads `(batch, seq, kv_heads * head_size)`.

        Args:
            x: the normalized residual stream.
            cos_sin: of the positions, from `rope_cos_sin`.
            mask: `(seq, seq)` or `(batch, 1, seq, seq)`; None: causal.
            first_value: the first block's values, to average with this block's; None: no value residual.
            past: keys and values of earlier tokens; replaces the mask.
        """
        heads = (-1, self.head_dim)
        query = apply_rope(self.query_norm(self.query(x).unflatten(-1, heads)), cos_sin).transpose(1, 2)
        key = apply_rope(self.key_norm(self.key(x).unflatten(-1, heads)), cos_sin).transpose(1, 2)
        own = self.value(x)
        mixed = own if first_value is None else (own + first_value) / 2
        value = mixed.unflatten(-1, heads).transpose(1, 2)
        if past is not None:
            key, value, mask = past.extend(key, value)
        attended = attention(query, key, value, mask)
        return self.out(attended.transpose(1, 2).flatten(2)), own


def build_mlp(config: LlamaConfig) -> nn.Module:
    """The MLP of a block, or the experts that replace it."""
    if config.n_experts is None:
        return MLP(config.dim, config.mlp_size, config.gated)
    width = config.n_shared_experts * config.expert_size
    return MixtureOfExperts(
        dim=config.dim,
        hidden_dim=config.expert_size,
        n_experts=config.n_experts,
        experts_per_token=config.experts_per_token,
        normalize_router_weights=config.normalize_router_weights,
        shared=MLP(config.dim, width, config.gated) if width else None,
        gated=config.gated,
        balanced=config.bias_update_rate is not None,
    )


class Block(nn.Module):
    """Attention and MLP, each with a norm before it, added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.value_residual, self.dropout = config.value_residual, config.dropout
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = build_mlp(config)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask = None,
        first_value: Tensor | None = None,
        past: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, seq, dim)` to the same shape, and with value residuals the block's values; else as `Attention`."""
        attended, value = self.attention(self.attention_norm(x), cos_sin, mask, first_value, past)
        x = x + F.dropout(attended, self.dropout, self.training)
        x = x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
        return x, value if self.value_residual else None


class Llama(LanguageModel):
    """Llama 3 and its relatives (Mistral, Mixtral, Qwen 2 and 3): token ids to logits."""

    tensor_plan: ClassVar[dict[str, str]] = {
        "token_embedding": "vocabulary",
        "ngram_embeddings.*": "vocabulary",
        "vision": "replicated",
        "blocks.*.attention_norm": "sequence",
        "blocks.*.attention.query": "column",
        "blocks.*.attention.key": "column",
        "blocks.*.attention.value": "column",
        "blocks.*.attention.query_norm": "heads",
        "blocks.*.attention.key_norm": "heads",
        "blocks.*.attention.out": "row",
        "blocks.*.mlp_norm": "sequence",
        "blocks.*.mlp.gate": "column",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "final_norm": "sequence",
        "head": "logits",
    }
    """A mixture of experts has no entry, so it cannot be sharded."""

    deferred_init: ClassVar[bool] = True
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
        config.check_fit()
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.ngram_embeddings = nn.ModuleList(nn.Embedding(config.ngram_rows, config.dim) for _ in config.ngrams)
        self.vision = build_vision(config.vision, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def layers(self) -> nn.ModuleList:
        """All blocks."""
        return self.blocks

    def features(
        self, tokens: Tensor, *, images: Tensor | None = None, images_ends: Tensor | None = None,
        cache: KVCache | None = None, **inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        """Token ids `(batch, seq)` to features `(batch, seq, dim)`; for images, see `Vision`; `inputs` are those of a
        subclass's embedding.

        Raises:
            ValueError: seq exceeds `max_seq_len` or what fits into the cache.
        """
        seq, config = tokens.shape[1], self.config
        assert config.max_seq_len is not None
        if seq > config.max_seq_len:
            raise ValueError(f"a sequence of {seq} tokens; this model reads at most {config.max_seq_len}")
        positions = torch.arange(seq, device=tokens.device) if cache is None else cache.begin(tokens, config.separator)
        past = [None] * len(self.blocks) if cache is None else cache.blocks
        masks = attention_masks(tokens, set(config.windows()), config.separator) if cache is None else {}
        cos_sin = rope_cos_sin(positions, config.rope_frequencies(positions.device))
        first_value, x = None, self._embed(tokens, cache, images=images, images_ends=images_ends, **inputs)
        if self.vision is not None:
            self.vision.open_masks(masks if cache is None else cache.masks, images_ends, tokens, cache)
        x = F.dropout(x, config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x, value = block(x, cos_sin, masks.get(config.window(layer)), first_value, past[layer])
            first_value = value if first_value is None else first_value
        return self.final_norm(x)  # type: ignore[no-any-return]

    def to_logits(self, features: Tensor) -> Tensor:
        """Features `(..., dim)` to logits `(..., vocab)`."""
        config = self.config
        logits: Tensor = F.linear(features, self.token_embedding.weight) if self.head is None else self.head(features)
        if config.logit_soft_cap is None:
            return logits
        return config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)

    def _embed(
        self, tokens: Tensor, cache: KVCache | None, images: Tensor | None = None, images_ends: Tensor | None = None
    ) -> Tensor:
        """`(batch, seq)` to `(batch, seq, dim)`: embeddings of tokens, and of images in the places of theirs."""
        x = self._embed_tokens(tokens, cache)
        return x if self.vision is None else self.vision(x, images, images_ends)

    def _embed_tokens(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """`(batch, seq)` to `(batch, seq, dim)`: embeddings of tokens, plus those of the n-grams that they end."""
        x, config = self.token_embedding(tokens), self.config
        if not config.ngrams:
            return x  # type: ignore[no-any-return]
        longest = max(config.ngrams)
        if cache is None:
            documents = None if config.separator is None else document_ids(tokens, config.separator)
            before = tokens_before(tokens, longest, documents)
        else:
            before = cache.tokens_before(longest)
        rows = ngram_rows(before, config.ngrams, config.ngram_rows, self.token_embedding.num_embeddings)
        for table, found in zip(self.ngram_embeddings, rows, strict=True):
            x = x + F.dropout(table(found), config.ngram_dropout, self.training)
        return x  # type: ignore[no-any-return]

    def head_parameters(self) -> list[Tensor]:
        """The head's matrix, or the embedding's where they are tied."""
        return list((self.token_embedding if self.head is None else self.head).parameters())

    def new_cache(self, rollback_tokens: int = 0) -> KVCache:
        """An empty cache for generation that can forget its last `rollback_tokens` tokens."""
        return KVCache(self.config.windows(), self.max_seq_len, rollback_tokens, keep_ids=bool(self.config.ngrams))

    def attention_heads(self) -> dict[str, int]:
        """The numbers of query heads and of key and value heads."""
        return {"n_heads": self.config.n_heads, "n_kv_heads": self.config.num_kv_heads}

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token: 6 per weight of a matrix, and per layer 12 x heads x head_size x tokens seen.

        Chowdhery et al. 2022 (PaLM), appendix B. Untied embeddings are looked up, not multiplied, and do not count; of
        experts, only those count that a token is routed to; a layer with a window sees no more tokens than that.
        """
        config = self.config
        weights = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() >= 2)
        looked_up = [*self.ngram_embeddings] if config.tied else [self.token_embedding, *self.ngram_embeddings]
        weights -= sum(cast(nn.Embedding, table).weight.numel() for table in looked_up)
        if config.n_experts is not None:
            idle = config.n_experts - config.experts_per_token
            matrices = 3 if config.gated else 2
            weights -= config.n_layers * idle * matrices * config.dim * config.expert_size
        seen = sum(min(seq_len, window or seq_len) for window in config.windows())
        return 6 * weights + 12 * config.n_heads * config.head_size * seen

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass without dropout saves for the backward pass, logits included.

        Per token and layer: the input of each of two norms, its output, and that before the gain (6 x dim, and one
        number each); query, key, value, the output of attention, and one number per query head; what the MLP or the
        experts save. At the end, the final norm's three, the log-probabilities, and what the soft cap saves (vocab
        each). A layer with a window saves its mask once per batch; with documents, every layer saves one per sample,
        though not on CUDA. A fused RMSNorm, as on CUDA, saves dim less.
        """
        config = self.config
        assert config.vocab_size is not None
        heads, kv_heads, head_size = config.n_heads, config.num_kv_heads, config.head_size
        per_layer = 6 * config.dim + 2 + 2 * (heads + kv_heads) * head_size + heads
        if config.qk_norm:
            per_layer += (heads + kv_heads) * (2 * head_size + 1)
        per_layer += _saved_by_mlp(config)
        capped = config.logit_soft_cap is not None
        per_token = config.n_layers * per_layer + 3 * config.dim + 1 + (1 + capped) * config.vocab_size
        masks = sum(seq_len > window for window in config.windows() if window is not None)
        if config.separator is not None:
            masks = config.n_layers * batch
        return 4 * (batch * seq_len * per_token + masks * seq_len**2)


def _saved_by_mlp(config: LlamaConfig) -> int:
    """Numbers per token that an MLP or its experts save for the backward pass.

    4 x hidden width for SwiGLU: the gate before and after SiLU, the up projection, and the product; 2 x for ReLU²: ReLU
    and its square. Experts also save a token's features before and after each of them, the probabilities, and where the
    token was routed to (8 bytes each).
    """
    within = 4 if config.gated else 2
    if config.n_experts is None:
        return within * config.mlp_size
    per_expert = 2 * config.dim + within * config.expert_size + 8
    return (
        config.experts_per_token * per_expert + config.n_experts + within * config.n_shared_experts * config.expert_size
    )
