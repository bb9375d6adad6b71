"""GPT-2 as Hugging Face and GGUF store it: configuration, names, layout of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.models.gpt import GPTConfig

# Hugging Face ---------------------------------------------------------------------------------------------------------

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "dim": "n_embd",
}
"""Fields of `GPTConfig` and their names in `config.json`."""

FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Entries of `config.json` with the values that `GPT` computes; the first is the default."""


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """The content of Hugging Face's `config.json`, with special tokens set to None."""
    values = vars(config)
    fields = {hf_name: values[name] for name, hf_name in FIELDS.items()}
    fixed = {name: allowed[0] for name, allowed in FIXED.items()}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    special = {"bos_token_id": None, "eos_token_id": None}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **fields, **fixed, **dropouts, **special}


def config_from_huggingface(entries: Mapping[str, Any]) -> GPTConfig:
    """The configuration from the content of Hugging Face's `config.json`.

    Raises:
        UserError: an entry is missing, or has a value that is not supported.
    """
    for name, allowed in FIXED.items():
        if entries.get(name, allowed[0]) not in allowed:
            raise UserError(f"{name} is {entries[name]!r}; allowed: {' or '.join(map(repr, allowed))}")
    if missing := [name for name in FIELDS.values() if name not in entries]:
        raise UserError(f"config.json has no {missing[0]!r}, which a model of type gpt2 needs")
    if entries.get("n_inner") not in (None, 4 * entries["n_embd"]):
        raise UserError(f"n_inner is {entries['n_inner']!r}; allowed: 4 x n_embd, which is {4 * entries['n_embd']}")
    fields = {name: entries[hf_name] for name, hf_name in FIELDS.items()}
    return GPTConfig(**fields, dropout=entries.get("resid_pdrop", 0.1))


def names_in_huggingface(config: GPTConfig) -> dict[str, str]:
    """Our parameter names and those of Hugging Face's `GPT2LMHeadModel`."""
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
        for part, hf_part in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{part}.{kind}"] = f"transformer.h.{layer}.{hf_part}.{kind}"
    return names


def _is_transposed(name: str) -> bool:
    return name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))


def from_huggingface(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of a `GPT2LMHeadModel`.

    There, linear layers are stored transposed, and the rows of all queries precede those of all keys and values.
    The files of the released weights omit the prefix ``transformer.``.

    Raises:
        UserError: a tensor is missing.
    """
    converted = {}
    for name, hf_name in names_in_huggingface(config).items():
        found = weights.get(hf_name, weights.get(hf_name.removeprefix("transformer.")))
        if found is None:
            raise UserError(f"the weights have no {hf_name!r}, which a model of type gpt2 needs")
        tensor = found.t() if _is_transposed(name) else found
        if ".qkv." in name:
            tensor = tensor.view(3, config.n_heads, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
        converted[name] = tensor.contiguous()
    return converted


def to_huggingface(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `GPT2LMHeadModel` from ours, without the tied head; missing biases become zeros."""
    converted = {}
    for name, hf_name in names_in_huggingface(config).items():
        tensor = weights.get(name)
        if tensor is None:
            tensor = torch.zeros(len(weights[name.replace(".bias", ".weight")]))
        if ".qkv." in name:
            tensor = tensor.view(config.n_heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
        converted[hf_name] = (tensor.t() if _is_transposed(name) else tensor).contiguous()
    return converted


# GGUF -----------------------------------------------------------------------------------------------------------------


def gguf_architecture(config: GPTConfig) -> str:
    """llama.cpp's name of the architecture."""
    return "gpt2"


def add_gguf_sizes(writer: Any, config: GPTConfig) -> None:
    """Writes the sizes of a model into a GGUF file."""
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(4 * config.dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)


def gguf_tensors(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, but with linear layers not transposed: `(out, in)`."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    converted = to_huggingface(config, weights)
    return {name: tensor.t() if name.endswith(linear) else tensor for name, tensor in converted.items()}


def extra_gguf_tensors(config: GPTConfig) -> dict[str, Tensor]:
    """Tensors that are not among the weights, by their names in GGUF: none."""
    return {}
