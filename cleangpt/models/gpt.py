"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"), exact to its released weights.

Learned positions, LayerNorm before attention and MLP, GELU in its tanh form, one matrix for embedding and head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import ModelConfig, check
from cleangpt.errors import UserError
from cleangpt.models.cache import BlockCache, KVCache
from cleangpt.models.parts import Reduce, attend, take


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """The 124M-parameter GPT-2 has max_seq_len 1024, n_layers 12, n_heads 12, dim 768."""

    n_layers: int
    """Blocks, each of attention and MLP."""
    n_heads: int
    """Attention heads; a divisor of dim."""
    dim: int
    """Width of the residual stream, in features."""
    bias: bool = True
    """Biases in linear layers and LayerNorms; GPT-2 has them."""
    dropout: float = 0.0
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


class GPT(nn.Module):
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
    """How each module is cut for tensor parallelism; the words are explained in `training/sharding.py`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial weights, in the order of the parameters."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Draws the parameter `name`: normal with deviation 0.02, less into the residual stream (GPT-2, sec. 2.3)."""
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
        else:
            into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers) if into_residual else 0.02)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> Tensor:
        """Token ids `(batch, seq)` to logits `(batch, seq, vocab)`; seq is at most `max_seq_len`.

        With a cache, the tokens come after those that it has, and are kept in it. `wanted` `(batch, count)` says after
        which of the tokens logits `(batch, count, vocab)` are wanted; none: after all. With `reduce`, returns what that
        makes of the features before the head.
        """
        past = [None] * len(self.blocks) if cache is None else cache.blocks
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.begin(tokens)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block, kept in zip(self.blocks, past, strict=True):
            x = block(x, kept)
        x = self.final_norm(x if wanted is None else take(x, wanted))
        return self.to_logits(x) if reduce is None else reduce(x, self.to_logits, [self.token_embedding.weight])

    def to_logits(self, x: Tensor) -> Tensor:
        """The head: normalised features `(..., dim)` to logits `(..., vocab)`."""
        return F.linear(x, self.token_embedding.weight)

    def new_cache(self, spare: int = 0) -> KVCache:
        """An empty cache for generation, which can go back by `spare` tokens."""
        return KVCache([None] * self.config.n_layers, self.config.max_seq_len, spare)

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


# Hugging Face --------------------------------------------------------------------------------------------------------

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "dim": "n_embd",
}
"""Our fields to those of `config.json` there."""

FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Entries there that are the same in every model of ours, and what they may be; the first is what it is by default."""


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """The content of Hugging Face's `config.json`; of special tokens it says that there are none."""
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fixed = {name: allowed[0] for name, allowed in FIXED.items()}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    ends = {"bos_token_id": None, "eos_token_id": None}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **fields, **fixed, **dropouts, **ends}


def config_from_huggingface(entries: Mapping[str, Any]) -> GPTConfig:
    """Our configuration from the content of Hugging Face's `config.json`.

    Raises:
        UserError: one line naming an entry that is missing or that asks for what is not here.
    """
    for name, allowed in FIXED.items():
        if entries.get(name, allowed[0]) not in allowed:
            raise UserError(f"{name} is {entries[name]!r}; allowed: {' or '.join(map(repr, allowed))}")
    if missing := [name for name in FIELDS.values() if name not in entries]:
        raise UserError(f"config.json has no {missing[0]!r}, which a model of type gpt2 needs")
    if entries.get("n_inner") not in (None, 4 * entries["n_embd"]):
        raise UserError(f"n_inner is {entries['n_inner']!r}; allowed: 4 x n_embd, which is {4 * entries['n_embd']}")
    fields = {ours: entries[theirs] for ours, theirs in FIELDS.items()}
    config = GPTConfig(**fields, dropout=entries.get("resid_pdrop", 0.1))
    check(config, "model.")
    return config


def names_in_huggingface(config: GPTConfig) -> dict[str, str]:
    """Our parameter names to those of Hugging Face's `GPT2LMHeadModel`."""
    names = {
        "token_embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
        "final_norm.weight": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
    }
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for layer in range(config.n_layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"transformer.h.{layer}.{theirs}.{kind}"
    return names


def _is_transposed(name: str) -> bool:
    return name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))


def from_huggingface(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of a `GPT2LMHeadModel`.

    There, linear layers are stored transposed, and the rows of all queries come before those of all keys and values.
    The files of the released weights leave out the prefix ``transformer.``.

    Raises:
        UserError: a tensor is missing.
    """
    converted = {}
    for ours, name in names_in_huggingface(config).items():
        found = weights.get(name, weights.get(name.removeprefix("transformer.")))
        if found is None:
            raise UserError(f"the weights have no {name!r}, which a model of type gpt2 needs")
        tensor = found.t() if _is_transposed(ours) else found
        if ".qkv." in ours:
            tensor = tensor.view(3, config.n_heads, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
        converted[ours] = tensor.contiguous()
    return converted


def to_huggingface(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Hugging Face's files from our state dict; biases that we left out are zeros there.

    The head, which is the embedding, is left out, as it is there.
    """
    converted = {}
    for ours, name in names_in_huggingface(config).items():
        tensor = weights.get(ours)
        if tensor is None:
            tensor = torch.zeros(len(weights[ours.replace(".bias", ".weight")]))
        if ".qkv." in ours:
            tensor = tensor.view(config.n_heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
        converted[name] = (tensor.t() if _is_transposed(ours) else tensor).contiguous()
    return converted
