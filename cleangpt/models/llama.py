"""Llama 3 (Dubey et al. 2024, "The Llama 3 herd of models") and its kin, exact to their released weights.

Rotary positions (Su et al. 2021), RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020), query heads that share keys
and values (Ainslie et al. 2023, "GQA"). Fields that are off by default make it Mistral, Mixtral, Qwen 2 or Qwen 3, or
add parts of other models.
"""

import math
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
    Seen,
    attend,
    both,
    document_blocks,
    document_ids,
    document_mask,
    window_mask,
)
from cleangpt.models.moe import MixtureOfExperts, hidden_features
from cleangpt.models.ngrams import ngram_rows, tokens_before
from cleangpt.validation import Bounds, Count, ShareBelowOne

Scale = Annotated[float, Bounds(above=0, most=1e30)]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama 3 8B has n_layers 32, n_heads 32, n_kv_heads 8, dim 4096, hidden_dim 14336, vocab_size 128256."""

    n_layers: Layers
    """Blocks, each of attention and MLP."""
    n_heads: Width
    """Heads of queries; a divisor of dim."""
    n_kv_heads: Width | None = None
    """Heads of keys and values, a divisor of n_heads; none: n_heads."""
    head_dim: Annotated[int, Bounds(2, 2**20, even=True)] | None = None
    """Features of a head, an even number; none: dim / n_heads."""
    dim: Width
    """Width of the residual stream, in features."""
    hidden_dim: Annotated[int, Bounds(1, 2**24)] | None = None
    """Width within the MLP, in features; None: 8/3 dim rounded up to a multiple of 64, for relu2 4 dim."""
    norm_eps: Scale = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """One matrix for embedding and head."""
    qkv_bias: bool = False
    """Biases of query, key and value; Qwen 2 has them."""
    qk_norm: bool = False
    """RMSNorm of each query and key over its head (Henry et al. 2020); Qwen 3 has it."""
    sliding_window: Count | None = None
    """Tokens that a position sees, itself among them (Beltagy et al. 2020); none: all before it."""
    global_every: Count | None = None
    """With a sliding window: every so-many-th block sees all tokens nevertheless; none: no block does."""
    rope_theta: Scale = 500_000.0
    """Base of the rotary wavelengths; the longest is nearly 2 pi rope_theta tokens."""
    rope_factor: Annotated[float, Bounds(1)] | None = None
    """Stretches long wavelengths for a longer context, as Llama 3.1 does (8); none: not at all."""
    rope_low_freq_factor: Scale = 1.0
    """Wavelengths over rope_original_seq_len / rope_low_freq_factor are stretched in full."""
    rope_high_freq_factor: Scale = 4.0
    """Wavelengths under rope_original_seq_len / rope_high_freq_factor stay; those between are stretched in part."""
    rope_original_seq_len: Count = 8192
    """Tokens in the context before it was made longer."""
    n_experts: Layers | None = None
    """Experts in the place of each MLP; none: an MLP."""
    experts_per_token: Count = 2
    """Experts that a token goes through."""
    expert_hidden_dim: Annotated[int, Bounds(1, 2**24)] | None = None
    """Width within an expert, in features; none: hidden_dim."""
    n_shared_experts: Annotated[int, Bounds(0, 4096)] = 0
    """Experts that every token goes through besides; they make one MLP so many times as wide."""
    normalize_router_weights: bool = True
    """The shares of a token's chosen experts add up to 1."""
    bias_update_rate: Scale | None = None
    """What a step adds to or takes from the bias by which an expert is chosen, so that all get as many tokens (Wang et
    al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts", algorithm 1, there 0.001); none: no
    biases."""
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """Of MLP and experts: gated, by three matrices, or the square of ReLU (So et al. 2021, "Primer"), by two."""
    value_residual: bool = False
    """Every block but the first attends to the mean of its own values and those of the first (Zhou et al. 2024, "Value
    residual learning", ResFormer with both factors 1/2, not learned)."""
    logit_soft_cap: Scale | None = None
    """Logits become logit_soft_cap x tanh(logits / logit_soft_cap) (Gemma Team 2024, "Gemma 2", section 2, there 30);
    none: they stay."""
    dropout: ShareBelowOne = 0.0
    """Share of activations dropped in training, after embedding, attention and MLP (Srivastava et al. 2014)."""
    ngrams: tuple[int, ...] = ()
    """Lengths, such as 2 and 3, of n-grams that have embeddings of their own, added to that of their last token (Huang
    et al. 2025, "Over-tokenized transformer")."""
    ngram_rows: Count = 16384
    """Rows in the table of each length; n-grams are put into them by a hash, so that some share one."""
    ngram_dropout: ShareBelowOne = 0.0
    """Share of their features dropped in training, before they are added: where a text is seen several times, so that
    they do not learn it by heart."""
    separator: Annotated[int, Bounds(0)] | None = None
    """Id of the token that ends a document, at which attention ends as well (Dubey et al. 2024, section 3.2); none:
    attention goes on. Positions are counted on, for only their distances matter."""

    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.dim // self.n_heads

    def expert_features(self) -> int:
        """Width within an expert, in features."""
        return self.expert_hidden_dim or self.mlp_size

    def resolved(self, vocab_size: int, seq_len: int) -> "LlamaConfig":
        """The same model with the fields filled in that are left open."""
        return replace(super().resolved(vocab_size, seq_len), hidden_dim=self.mlp_size)

    @property
    def mlp_size(self) -> int:
        """Width within the MLP, in features; with a gate, 8/3 dim gives as many weights as 4 dim without one."""
        derived = -(-8 * self.dim // (3 * 64)) * 64 if self.gated else 4 * self.dim
        return derived if self.hidden_dim is None else self.hidden_dim

    @property
    def gated(self) -> bool:
        """Whether MLP and experts have a gate."""
        return self.activation == "swiglu"

    def window(self, layer: int) -> int | None:
        """Tokens that a position sees in a block, counted from 0; none: all before it."""
        sees_all = self.global_every is not None and (layer + 1) % self.global_every == 0
        return None if sees_all else self.sliding_window

    def check_fit(self) -> None:
        """Checks what one field demands of another.

        Raises:
            UserError: one line naming the field, its value and what is allowed.
        """
        if self.n_heads % self.kv_heads():
            raise UserError(
                f"model.n_kv_heads is {self.n_kv_heads}; allowed: a divisor of model.n_heads, which is {self.n_heads}"
            )
        if self.head_dim is None and self.dim % (2 * self.n_heads):
            raise UserError(
                f"model.dim is {self.dim}; allowed without model.head_dim: an even multiple of model.n_heads, which "
                f"is {self.n_heads}"
            )
        if self.n_experts is not None and self.experts_per_token > self.n_experts:
            raise UserError(
                f"model.experts_per_token is {self.experts_per_token}; allowed: at most model.n_experts, which is "
                f"{self.n_experts}"
            )
        if self.n_experts is None and self.bias_update_rate is not None:
            raise UserError(f"model.bias_update_rate is {self.bias_update_rate}; allowed without model.n_experts: None")
        if any(not 2 <= length <= 16 for length in self.ngrams) or len(set(self.ngrams)) < len(self.ngrams):
            raise UserError(f"model.ngrams is {self.ngrams}; allowed: different whole numbers from 2 to 16")
        if self.separator is not None and self.vocab_size is not None and self.separator >= self.vocab_size:
            raise UserError(
                f"model.separator is {self.separator}; allowed: less than model.vocab_size, which is {self.vocab_size}"
            )
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise UserError(
                f"model.rope_low_freq_factor is {self.rope_low_freq_factor}; allowed: less than "
                f"model.rope_high_freq_factor, which is {self.rope_high_freq_factor}"
            )


def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Radians per token `(head_dim / 2,)`, float32, of each pair of features (Su et al. 2021, section 3.2.2).

    With `rope_factor`, long wavelengths are stretched as in Llama 3.1.
    """
    head_dim = config.head_size()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1 / config.rope_theta**exponents
    if config.rope_factor is None:
        return frequencies
    turns = config.rope_original_seq_len * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


def rope_cos_sin(config: LlamaConfig, positions: Tensor) -> Tensor:
    """Cosine and sine `(2, ..., seq, 1, head_dim / 2)`, float32, of the angles at `positions` `(..., seq)`."""
    angles = positions.float()[..., None] * rope_frequencies(config, positions.device)
    return torch.stack([angles.cos(), angles.sin()])[..., None, :]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns feature i with feature i + head_dim / 2 of `x` `(batch, seq, heads, head_dim)`; the shape stays.

    Computed in float32, returned in the dtype of `x`. The pairs are those of Hugging Face's weights; Su et al. 2021,
    equation 34, pairs neighbours, which is the same up to the order of a head's features.
    """
    cos, sin = rotation.float()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def attention_masks(config: LlamaConfig, tokens: Tensor) -> dict[int | None, Seen]:
    """What each of `tokens` `(batch, seq)` sees in a block, by that block's window."""
    windows = {config.window(layer) for layer in range(config.n_layers)}
    seq = tokens.shape[1]
    documents = None if config.separator is None else document_ids(tokens, config.separator)
    if documents is not None and tokens.is_cuda:
        return {window: document_blocks(documents, window) for window in windows}
    seen = None if documents is None else document_mask(documents)
    positions = torch.arange(seq, device=tokens.device)
    limits = {window: window_mask(positions, window) if window and seq > window else None for window in windows}
    return {window: both(seen, limit) for window, limit in limits.items()}


class Attention(nn.Module):
    """Causal self-attention over rotated queries and keys; a group of query heads shares one head of keys and values.

    How many heads there are here follows from the rows of the matrices, so that a cut between heads is allowed.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = head_dim = config.head_size()
        self.query = nn.Linear(config.dim, config.n_heads * head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.dim, config.kv_heads() * head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.dim, config.kv_heads() * head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_heads * head_dim, config.dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        seen: Seen = None,
        first_value: Tensor | None = None,
        past: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(batch, seq, dim)` to the same shape, and the values of all heads `(batch, seq, features)`.

        Args:
            x: the normalised residual stream.
            rotation: of the positions, from `rotation_of`.
            seen: which positions each may see, `(seq, seq)` or `(batch, 1, seq, seq)`; none: itself and all before.
            first_value: the values of the first block, to be mixed into these; none: nothing is.
            past: what the block has kept of the tokens before; it says what is seen.
        """
        heads = (-1, self.head_dim)
        query = rotate(self.query_norm(self.query(x).unflatten(-1, heads)), rotation).transpose(1, 2)
        key = rotate(self.key_norm(self.key(x).unflatten(-1, heads)), rotation).transpose(1, 2)
        own = self.value(x)
        mixed = own if first_value is None else (own + first_value) / 2
        value = mixed.unflatten(-1, heads).transpose(1, 2)
        if past is not None:
            key, value, seen = past.extend(key, value)
        attended = attend(query, key, value, seen)
        return self.out(attended.transpose(1, 2).flatten(2)), own


class MLP(nn.Module):
    """SwiGLU: one linear layer gates another, a third leads back (Shazeer 2020, equation 6). Without a gate: ReLU²."""

    def __init__(self, dim: int, hidden_dim: int, gated: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if gated else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` to the same shape, each position for itself."""
        gate = None if self.gate is None else self.gate(x)
        return self.down(hidden_features(gate, self.up(x)))  # type: ignore[no-any-return]


def build_mlp(config: LlamaConfig) -> nn.Module:
    """The MLP of a block, or the experts in its place."""
    if config.n_experts is None:
        return MLP(config.dim, config.mlp_size, config.gated)
    width = config.n_shared_experts * config.expert_features()
    return MixtureOfExperts(
        dim=config.dim,
        hidden_dim=config.expert_features(),
        n_experts=config.n_experts,
        experts_per_token=config.experts_per_token,
        normalize_router_weights=config.normalize_router_weights,
        shared=MLP(config.dim, width, config.gated) if width else None,
        gated=config.gated,
        balanced=config.bias_update_rate is not None,
    )


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream after."""

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
        rotation: Tensor,
        seen: Seen = None,
        first_value: Tensor | None = None,
        past: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, seq, dim)` to the same shape, and with value residuals its values; the rest as in `Attention`."""
        attended, value = self.attention(self.attention_norm(x), rotation, seen, first_value, past)
        x = x + F.dropout(attended, self.dropout, self.training)
        x = x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
        return x, value if self.value_residual else None


class Llama(LanguageModel):
    """Llama 3 and its kin (Mistral, Mixtral, Qwen 2 and 3), exact to their released weights: token ids to logits."""

    tensor_plan: ClassVar[dict[str, str]] = {
        "token_embedding": "vocabulary",
        "ngram_embeddings.*": "vocabulary",
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
    """How each module is cut for tensor parallelism; the words are explained in `distributed/sharding.py`. A mixture of
    experts is not in it."""

    deferred_init: ClassVar[bool] = True
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
        config.check_fit()
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.ngram_embeddings = nn.ModuleList(nn.Embedding(config.ngram_rows, config.dim) for _ in config.ngrams)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def layers(self) -> nn.ModuleList:
        """All blocks."""
        return self.blocks

    def features(self, tokens: Tensor, *, cache: KVCache | None = None, **modalities: Tensor) -> Tensor:
        """Token ids `(batch, seq)` to `(batch, seq, dim)`.

        Raises:
            ValueError: seq is more than `max_seq_len`, or than the cache has room for.
        """
        seq, config = tokens.shape[1], self.config
        assert config.max_seq_len is not None
        if seq > config.max_seq_len:
            raise ValueError(f"a sequence of {seq} tokens; this model reads at most {config.max_seq_len}")
        positions = torch.arange(seq, device=tokens.device) if cache is None else cache.begin(tokens, config.separator)
        past = [None] * len(self.blocks) if cache is None else cache.blocks
        seen = attention_masks(config, tokens) if cache is None else {}
        rotation = rope_cos_sin(config, positions)
        first_value = None
        x = F.dropout(self._embed(tokens, cache), config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x, value = block(x, rotation, seen.get(config.window(layer)), first_value, past[layer])
            first_value = value if first_value is None else first_value
        return self.final_norm(x)  # type: ignore[no-any-return]

    def to_logits(self, features: Tensor) -> Tensor:
        """The head: normalised features `(..., dim)` to logits `(..., vocab)`."""
        config = self.config
        logits: Tensor = F.linear(features, self.token_embedding.weight) if self.head is None else self.head(features)
        if config.logit_soft_cap is None:
            return logits
        return config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)

    def _embed(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """`(batch, seq)` to `(batch, seq, dim)`: the embedding of each token, and those of the n-grams that it ends."""
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
        """An empty cache for generation, from which `rollback_tokens` can be taken back."""
        assert self.config.max_seq_len is not None
        windows = [self.config.window(layer) for layer in range(self.config.n_layers)]
        return KVCache(windows, self.config.max_seq_len, rollback_tokens, keep_ids=bool(self.config.ngrams))

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token: 6 per weight of a matrix and 12 x heads x head_dim x tokens seen per layer.

        Chowdhery et al. 2022 (PaLM), appendix B. An embedding of its own is looked up, not multiplied, and does not
        count; of experts, those count that a token goes through; a layer with a window sees no more than that.
        """
        config = self.config
        weights = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() >= 2)
        looked_up = [*self.ngram_embeddings] if config.tied else [self.token_embedding, *self.ngram_embeddings]
        weights -= sum(cast(nn.Embedding, table).weight.numel() for table in looked_up)
        if config.n_experts is not None:
            idle = config.n_experts - config.experts_per_token
            matrices = 3 if config.gated else 2
            weights -= config.n_layers * idle * matrices * config.dim * config.expert_features()
        seen = sum(min(seq_len, config.window(layer) or seq_len) for layer in range(config.n_layers))
        return 6 * weights + 12 * config.n_heads * config.head_size() * seen

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass without dropout keeps for the backward pass, logits included.

        Per token and layer: of each of two norms its input, its output and that without the gain (6 x dim, and one
        number each); query, key, value, the output of attention and one number a query head; what the MLP or
        the experts keep. At the end the final norm's three, the log-probabilities and what the soft cap keeps (vocab
        each). A layer with a window keeps its mask, once for the batch; with documents, every layer keeps one for each
        sample, which it does not on CUDA. A fused RMSNorm, as on CUDA, keeps dim less.
        """
        config = self.config
        assert config.vocab_size is not None
        heads, kv_heads, head_dim = config.n_heads, config.kv_heads(), config.head_size()
        per_layer = 6 * config.dim + 2 + 2 * (heads + kv_heads) * head_dim + heads
        if config.qk_norm:
            per_layer += (heads + kv_heads) * (2 * head_dim + 1)
        per_layer += _mlp_numbers_kept(config)
        capped = config.logit_soft_cap is not None
        per_token = config.n_layers * per_layer + 3 * config.dim + 1 + (1 + capped) * config.vocab_size
        windows = [config.window(layer) for layer in range(config.n_layers)]
        masks = sum(seq_len > window for window in windows if window is not None)
        if config.separator is not None:
            masks = config.n_layers * batch
        return 4 * (batch * seq_len * per_token + masks * seq_len**2)


def _mlp_numbers_kept(config: LlamaConfig) -> int:
    """Numbers that an MLP or its experts keep for the backward pass, per token.

    Four times the width: of the gate before and after SiLU, of what it gates, and of their product; or twice, of ReLU
    and its square. Experts keep also a token's features before and after each of them, the probabilities, and where the
    token went (8 bytes each).
    """
    within = 4 if config.gated else 2
    if config.n_experts is None:
        return within * config.mlp_size
    per_expert = 2 * config.dim + within * config.expert_features() + 8
    return (
        config.experts_per_token * per_expert
        + config.n_experts
        + within * config.n_shared_experts * config.expert_features()
    )
