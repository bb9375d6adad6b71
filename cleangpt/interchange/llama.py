"""Llama, Mistral, Mixtral, Qwen 2 and Qwen 3 as Hugging Face and GGUF store them: configuration, names, weights.

More than 400 lines, since six families share it, each with its own defaults.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.models.llama import LlamaConfig

# Hugging Face ---------------------------------------------------------------------------------------------------------


class HFFamily(NamedTuple):
    """An architecture of Hugging Face, and the optional fields of `LlamaConfig` that it has."""

    architecture: str
    required: frozenset[str] = frozenset()
    """Fields that every model of this family sets."""
    optional: frozenset[str] = frozenset()
    """Fields that a model of this family may set."""


HF_FAMILIES: dict[str, HFFamily] = {
    "llama": HFFamily("LlamaForCausalLM"),
    "mistral": HFFamily("MistralForCausalLM", frozenset({"sliding_window"})),
    "qwen2": HFFamily("Qwen2ForCausalLM", frozenset({"qkv_bias"}), frozenset({"sliding_window", "global_every"})),
    "qwen3": HFFamily("Qwen3ForCausalLM", frozenset({"qk_norm"}), frozenset({"sliding_window", "global_every"})),
    "mixtral": HFFamily("MixtralForCausalLM", frozenset({"n_experts"}), frozenset({"sliding_window"})),
    "qwen3_moe": HFFamily(
        "Qwen3MoeForCausalLM",
        frozenset({"n_experts", "qk_norm"}),
        frozenset({"sliding_window", "expert_hidden_dim", "normalize_router_weights"}),
    ),
}
"""Hugging Face's models that `LlamaConfig` describes, by their `model_type`."""

OPTIONAL_FIELDS = {
    "qkv_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "global_every": None,
    "n_experts": None,
    "expert_hidden_dim": None,
    "n_shared_experts": 0,
    "normalize_router_weights": True,
    "bias_update_rate": None,
    "activation": "swiglu",
    "value_residual": False,
    "logit_soft_cap": None,
    "ngrams": (),
    "separator": None,
}
"""Fields that not every family has, with the values that turn them off."""

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
}
"""Fields of `LlamaConfig` and their names in every `config.json`."""

_COMMON: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_size": 4096,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
_MISTRAL = {"vocab_size": 32000, "max_position_embeddings": 131072, "intermediate_size": 14336}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
_DENSE_QWEN = {"intermediate_size": 22016, "num_key_value_heads": 32, "max_window_layers": 28}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"vocab_size": 32000, "max_position_embeddings": 2048, "intermediate_size": 11008},
    "mistral": _COMMON | _MISTRAL | {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": _COMMON
    | _MISTRAL
    | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": _COMMON | _QWEN | _DENSE_QWEN,
    "qwen3": _COMMON | _QWEN | _DENSE_QWEN | {"head_dim": 128},
    "qwen3_moe": _COMMON
    | _QWEN
    | {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 6144, "num_key_value_heads": 4}
    | {"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}
    | {"decoder_sparse_step": 1, "mlp_only_layers": None},
}
"""What Transformers takes for an entry that `config.json` leaves out, by `model_type`."""

ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": (None, []),
}
"""Entries of `config.json` with the values that `Llama` computes."""

ROPE_FIELDS = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_seq_len": "original_max_position_embeddings",
}
"""Fields of `LlamaConfig` and their names in a `rope_scaling` of type llama3."""


def model_type(config: LlamaConfig) -> str:
    """Hugging Face's `model_type` of a configuration: a key of HF_FAMILIES.

    Raises:
        UserError: no family has this combination of optional fields.
    """
    values = vars(config)
    used = {name for name, unset in OPTIONAL_FIELDS.items() if values[name] != unset}
    for name, family in HF_FAMILIES.items():
        if family.required <= used <= family.required | family.optional:
            return name
    raise UserError(
        f"Hugging Face has no model with {' and '.join('model.' + name for name in sorted(used))}; allowed: what "
        f"{', '.join(HF_FAMILIES)} have"
    )


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The content of Hugging Face's `config.json`, with special tokens set to None.

    Raises:
        UserError: no family has this combination of optional fields.
    """
    kind, values = model_type(config), vars(config)
    entries = {hf_name: values[name] for name, hf_name in FIELDS.items()} | {
        "model_type": kind,
        "architectures": [HF_FAMILIES[kind].architecture],
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.rope_factor is not None:
        scaling = {hf_name: values[name] for name, hf_name in ROPE_FIELDS.items()}
        entries["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return entries | _window_entries(config, kind) | _expert_entries(config, kind)


def _window_entries(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """The entries that describe sliding windows."""
    if kind == "llama":
        return {}
    entries: dict[str, Any] = {"sliding_window": config.sliding_window}
    if kind.startswith("qwen"):
        types = ["full_attention" if window is None else "sliding_attention" for window in config.windows()]
        entries |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
        entries |= {} if kind == "qwen3_moe" else {"layer_types": types}
    return entries


def _expert_entries(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """The entries that describe experts."""
    if config.n_experts is None:
        return {}
    top_k = {"num_experts_per_tok": config.experts_per_token}
    if kind == "mixtral":
        return top_k | {"num_local_experts": config.n_experts}
    return top_k | {
        "num_experts": config.n_experts,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.normalize_router_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def config_from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """The configuration from the content of Hugging Face's `config.json`.

    Raises:
        UserError: an entry is missing, or has a value that is not supported.
    """
    if (kind := entries.get("model_type")) not in HF_FAMILIES:
        raise UserError(f"model_type is {kind!r}; allowed: {', '.join(HF_FAMILIES)}")
    renamed = {"num_experts": "num_local_experts"}
    entries = DEFAULTS[kind] | {renamed.get(name, name): value for name, value in entries.items()}
    for name, allowed in ALLOWED.items():
        if name in entries and entries[name] not in allowed:
            raise UserError(f"{name} is {entries[name]!r}; allowed: {' or '.join(map(repr, allowed))}")
    return LlamaConfig(
        **{name: entries[hf_name] for name, hf_name in FIELDS.items()},
        n_kv_heads=entries["num_key_value_heads"],
        head_dim=_head_dim(entries),
        norm_eps=entries["rms_norm_eps"],
        tied=entries["tie_word_embeddings"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        **_rope_fields(entries),
        **_window_fields(entries),
        **_expert_fields(entries),
    )


def _head_dim(entries: Mapping[str, Any]) -> int | None:
    """None if it equals dim / n_heads."""
    head_dim: int | None = entries["head_dim"]
    implied = head_dim is not None and head_dim * entries["num_attention_heads"] == entries["hidden_size"]
    return None if implied else head_dim


def _rope_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters are in `rope_parameters` or, before Transformers 5, in two entries."""
    rope = {"rope_theta": entries["rope_theta"]}
    rope |= (entries.get("rope_scaling") or {}) | (entries.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type is {kind!r}; allowed: default, llama3")
    if (rotated := rope.get("partial_rotary_factor", 1)) != 1:
        raise UserError(f"partial_rotary_factor is {rotated!r}; allowed: 1")
    if kind == "default":
        return {"rope_theta": rope["rope_theta"]}
    if missing := [name for name in ROPE_FIELDS.values() if name not in rope]:
        raise UserError(f"config.json has no {missing[0]!r} for rope_type 'llama3'")
    return {"rope_theta": rope["rope_theta"]} | {name: rope[hf_name] for name, hf_name in ROPE_FIELDS.items()}


def _window_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding windows must be in all layers, or in all but every n-th."""
    kind, window = entries["model_type"], entries["sliding_window"]
    if kind == "llama" or window is None or not entries.get("use_sliding_window", True):
        return {}
    n_layers, types = entries["num_hidden_layers"], None
    if kind in ("qwen2", "qwen3"):
        first = entries["max_window_layers"]
        types = entries.get("layer_types") or [
            "sliding_attention" if layer >= first else "full_attention" for layer in range(n_layers)
        ]
        if len(types) != n_layers or not set(types) <= {"sliding_attention", "full_attention"}:
            raise UserError(f"layer_types is {types}; allowed: full_attention or sliding_attention, {n_layers} times")
    global_layers = [layer + 1 for layer, name in enumerate(types or []) if name == "full_attention"]
    if len(global_layers) == n_layers:
        return {}
    every = global_layers[0] if global_layers else None
    if every is not None and global_layers != list(range(every, n_layers + 1, every)):
        raise UserError(f"layers {global_layers} have full attention; allowed: none, or every n-th")
    return {"sliding_window": window, "global_every": every}


def _expert_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := entries["model_type"]) not in ("mixtral", "qwen3_moe"):
        return {}
    return {
        "n_experts": entries["num_local_experts"],
        "experts_per_token": entries["num_experts_per_tok"],
        "expert_hidden_dim": entries["moe_intermediate_size"] if kind == "qwen3_moe" else None,
        "normalize_router_weights": entries["norm_topk_prob"] if kind == "qwen3_moe" else True,
    }


def names_in_huggingface(config: LlamaConfig) -> dict[str, str]:
    """Our parameter names and Hugging Face's.

    The matrices of experts are stacked here and separate there; such a name has ``{}`` for the expert's number.

    Raises:
        UserError: no family has this combination of optional fields.
    """
    parts = {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        **_mlp_names(model_type(config)),
    }
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts[f"attention.{part}.{kind}"] = f"self_attn.{part[0]}_proj.{kind}"
    if config.qk_norm:
        parts |= {f"attention.{part}_norm.weight": f"self_attn.{part[0]}_norm.weight" for part in ("query", "key")}
    names = {"token_embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    for layer in range(config.n_layers):
        names |= {f"blocks.{layer}.{name}": f"model.layers.{layer}.{hf_name}" for name, hf_name in parts.items()}
    return names if config.tied else names | {"head.weight": "lm_head.weight"}


def _mlp_names(kind: str) -> dict[str, str]:
    """Names of the parameters of a block's MLP or experts."""
    if kind == "mixtral":
        experts = {"gate": "w1", "up": "w3", "down": "w2"}
        names = {f"mlp.{part}": f"block_sparse_moe.experts.{{}}.{hf_part}.weight" for part, hf_part in experts.items()}
        return names | {"mlp.router.weight": "block_sparse_moe.gate.weight"}
    if kind == "qwen3_moe":
        names = {f"mlp.{part}": f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")}
        return names | {"mlp.router.weight": "mlp.gate.weight"}
    return {f"mlp.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def of_all_experts(config: LlamaConfig, hf_name: str) -> list[str]:
    """The name of each expert's matrix, where ``{}`` stands for its number; else the name alone."""
    return [hf_name.format(expert) for expert in range(config.n_experts or 1)] if "{}" in hf_name else [hf_name]


UNUSED_WEIGHTS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Frequencies that earlier versions of Transformers saved with the weights."""


def used_weights(config: LlamaConfig) -> set[str]:
    """Hugging Face's names of the weights that are read."""
    return {name for hf_name in names_in_huggingface(config).values() for name in of_all_experts(config, hf_name)}


def from_huggingface(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from Hugging Face's.

    Raises:
        UserError: a tensor is missing, or no family has this combination of optional fields.
    """
    converted = {}
    for name, hf_name in names_in_huggingface(config).items():
        stacked, hf_names = "{}" in hf_name, of_all_experts(config, hf_name)
        if missing := [name for name in hf_names if name not in weights]:
            raise UserError(f"the weights have no {missing[0]!r}, which a model of type {model_type(config)} needs")
        tensors = [weights[name] for name in hf_names]
        converted[name] = torch.stack(tensors) if stacked else tensors[0]
    return converted


def to_huggingface(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's state dict from ours, without a tied head, which Hugging Face does not store either.

    Raises:
        UserError: no family has this combination of optional fields.
    """
    converted = {}
    for name, hf_name in names_in_huggingface(config).items():
        stacked = "{}" in hf_name
        for expert, tensor in enumerate(weights[name] if stacked else [weights[name]]):
            converted[hf_name.format(expert)] = tensor.contiguous()
    return converted


# GGUF -----------------------------------------------------------------------------------------------------------------

GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""llama.cpp's names of architectures, by Hugging Face's `model_type`."""


def gguf_architecture(config: LlamaConfig) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        UserError: llama.cpp's architecture does not compute the same.
    """
    assert config.max_seq_len is not None
    if any(window is not None and window < config.max_seq_len for window in config.windows()):
        raise UserError(
            f"model.sliding_window is {config.sliding_window}; allowed in GGUF: None, or model.max_seq_len or more, "
            f"which is {config.max_seq_len}"
        )
    if not config.normalize_router_weights:
        raise UserError("model.normalize_router_weights is False; allowed in GGUF: True")
    architecture = GGUF_ARCHITECTURES[model_type(config)]
    if architecture != "llama" and config.rope_factor is not None:
        raise UserError(
            f"model.rope_factor is {config.rope_factor}; allowed in GGUF: None, as llama.cpp's {architecture} has no "
            "scaled rotary positions"
        )
    if architecture == "qwen2" and config.head_size * config.n_heads != config.dim:
        raise UserError(
            f"model.head_dim is {config.head_dim}; allowed in GGUF with model.qkv_bias: model.dim / model.n_heads"
        )
    return architecture


def add_gguf_sizes(writer: Any, config: LlamaConfig) -> None:
    """Writes the sizes of a model into a GGUF file."""
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if config.n_experts is not None:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.expert_size)


def gguf_tensors(config: LlamaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, with the matrices of all experts stacked."""
    neighbors = GGUF_ARCHITECTURES[model_type(config)] == "llama"
    heads = {"attention.query.weight": config.n_heads, "attention.key.weight": config.num_kv_heads}
    tensors = {}
    for name, hf_name in names_in_huggingface(config).items():
        tensor, part = weights[name], ".".join(name.split(".")[2:])
        if neighbors and part in heads:
            tensor = _pair_neighbors(tensor, heads[part])
        tensors[hf_name.replace(".{}", "")] = tensor
    return tensors


def extra_gguf_tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Tensors that are not among the weights, by their names in GGUF: how much each rotary wavelength is stretched."""
    if config.rope_factor is None:
        return {}
    device = torch.device("cpu")
    unscaled = dataclasses.replace(config, rope_factor=None)
    return {"rope_freqs.weight": unscaled.rope_frequencies(device) / config.rope_frequencies(device)}


def _pair_neighbors(tensor: Tensor, heads: int) -> Tensor:
    """Rows `(heads * head_size, dim)`, reordered so that a rotary position rotates neighbors."""
    return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).flatten(0, 2)
