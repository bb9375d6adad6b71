"""GPT-2 in Hugging Face's files: names, configuration and the layout of weights there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.models.gpt import GPTConfig

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
    return GPTConfig(**fields, dropout=entries.get("resid_pdrop", 0.1))


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


# GGUF


def add_gguf_sizes(writer: Any, config: GPTConfig) -> None:
    """Writes the sizes of a model into a GGUF file."""
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(4 * config.dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)


def gguf_tensors(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """By Hugging Face's names, but with linear layers as `(out, in)`, which there are the other way round."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    converted = to_huggingface(config, weights)
    return {name: tensor.t() if name.endswith(linear) else tensor for name, tensor in converted.items()}
