"""GPT-2 and its relatives as Hugging Face and GGUF store them: configuration, names, layout of the weights."""

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
    "hidden_dim": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
    "scale_attention": "scale_attn_weights",
    "scale_attention_by_layer": "scale_attn_by_inverse_layer_idx",
    "dropout": "resid_pdrop",
}
"""Fields of `GPTConfig` and their names in `config.json`."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "resid_pdrop": 0.1,
}
"""What Transformers takes for an entry that `config.json` leaves out."""

ALIASES = {
    "max_position_embeddings": "n_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
"""Other names that Transformers takes for an entry."""

ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"),
    "gelu": ("gelu", "gelu_python"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
"""Values of `GPTConfig.activation` and their names in `config.json`; the first is written."""

UNUSED_WEIGHTS = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
"""Masks that earlier versions of Transformers saved with the weights."""


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """The content of Hugging Face's `config.json`, with special tokens set to None."""
    values = vars(config)
    fields = {hf_name: values[name] for name, hf_name in FIELDS.items()}
    return fields | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": ACTIVATIONS[config.activation][0],
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        # In fp16, the scores of such a model overflow in Transformers' unfused attention unless it does this.
        "reorder_and_upcast_attn": config.scale_attention_by_layer,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_from_huggingface(entries: Mapping[str, Any]) -> GPTConfig:
    """The configuration from the content of Hugging Face's `config.json`.

    Whether attention computes in fp32 (`reorder_and_upcast_attn`) is not read: fused attention always does.

    Raises:
        UserError: an entry has a value that is not supported.
    """
    entries = DEFAULTS | {ALIASES.get(name, name): value for name, value in entries.items()}
    activations = {hf_name: name for name, hf_names in ACTIVATIONS.items() for hf_name in hf_names}
    if entries["activation_function"] not in activations:
        name = entries["activation_function"]
        raise UserError(f"activation_function is {name!r}; allowed: {', '.join(activations)}")
    if entries["add_cross_attention"]:
        raise UserError("add_cross_attention is True; allowed: False")
    fields = {name: entries[hf_name] for name, hf_name in FIELDS.items()}
    if fields["hidden_dim"] == 4 * fields["dim"]:
        fields["hidden_dim"] = None
    return GPTConfig(**fields, activation=activations[entries["activation_function"]])  # type: ignore[arg-type]


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
    return names if config.tied else names | {"head.weight": "lm_head.weight"}


def used_weights(config: GPTConfig) -> set[str]:
    """Hugging Face's names of the weights that are read, with and without the prefix ``transformer.``."""
    names = set(names_in_huggingface(config).values())
    return names | {name.removeprefix("transformer.") for name in names}


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
    """llama.cpp's name of the architecture.

    Raises:
        UserError: llama.cpp does not compute the same.
    """
    computed = {"activation": "gelu_tanh", "scale_attention": True, "scale_attention_by_layer": False}
    for name, allowed in computed.items():
        if (value := vars(config)[name]) != allowed:
            raise UserError(f"model.{name} is {value!r}; allowed in GGUF: {allowed!r}")
    return "gpt2"


def add_gguf_sizes(writer: Any, config: GPTConfig) -> None:
    """Writes the sizes of a model into a GGUF file."""
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.norm_eps)


def gguf_tensors(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, but with linear layers not transposed: `(out, in)`."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    converted = to_huggingface(config, weights)
    return {name: tensor.t() if name.endswith(linear) else tensor for name, tensor in converted.items()}


def extra_gguf_tensors(config: GPTConfig) -> dict[str, Tensor]:
    """Tensors that are not among the weights, by their names in GGUF: none."""
    return {}
