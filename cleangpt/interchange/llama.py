"""Llama, Mistral, Mixtral, Qwen 2 and Qwen 3 in Hugging Face's files: names, configuration, weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.models.llama import LlamaConfig, rope_frequencies


# Hugging Face --------------------------------------------------------------------------------------------------------
class HFFamily(NamedTuple):
    """An architecture of Hugging Face, and those of our optional fields that it has."""

    architecture: str
    always: frozenset[str] = frozenset()
    """Optional fields that are set in every model of this kind."""
    perhaps: frozenset[str] = frozenset()
    """Optional fields that may be set."""


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
"""The models of Hugging Face that are Llamas, by their `model_type`."""


OPTIONAL = {
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
"""Our optional fields, and their values where they are not set."""


FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
}
"""Our fields to those of every `config.json` there."""


ROPE_FIELDS = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_seq_len": "original_max_position_embeddings",
}
"""Our fields to those of rotary scaling of type llama3 there."""


def model_type(config: LlamaConfig) -> str:
    """Hugging Face's name of the kind of model that a configuration describes: a key of KIN.

    Raises:
        UserError: no kind has these optional fields together.
    """
    used = {name for name, unset in OPTIONAL.items() if getattr(config, name) != unset}
    for kind, kin in HF_FAMILIES.items():
        if kin.always <= used <= kin.always | kin.perhaps:
            return kind
    raise UserError(
        f"Hugging Face has no model with {' and '.join('model.' + name for name in sorted(used))}; allowed: what "
        f"{', '.join(HF_FAMILIES)} have"
    )


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The content of Hugging Face's `config.json`; of special tokens it says that there are none.

    Raises:
        UserError: no kind of model there has these fields.
    """
    kind = model_type(config)
    entries = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | {
        "model_type": kind,
        "architectures": [HF_FAMILIES[kind].architecture],
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.kv_heads(),
        "head_dim": config.head_size(),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.rope_factor is not None:
        scaling = {theirs: getattr(config, ours) for ours, theirs in ROPE_FIELDS.items()}
        entries["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return entries | _window_entries(config, kind) | _expert_entries(config, kind)


def _window_entries(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """What says there how far a position sees."""
    if kind == "llama":
        return {}
    entries: dict[str, Any] = {"sliding_window": config.sliding_window}
    if kind.startswith("qwen"):
        windows = [config.window(layer) for layer in range(config.n_layers)]
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        entries |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
        entries |= {} if kind == "qwen3_moe" else {"layer_types": types}
    return entries


def _expert_entries(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """What says there how experts are chosen."""
    if config.n_experts is None:
        return {}
    chosen = {"num_experts_per_tok": config.experts_per_token}
    if kind == "mixtral":
        return chosen | {"num_local_experts": config.n_experts}
    return chosen | {
        "num_experts": config.n_experts,
        "moe_intermediate_size": config.expert_features(),
        "norm_topk_prob": config.normalize_router_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def config_from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """Our configuration from the content of Hugging Face's `config.json`.

    Raises:
        UserError: one line naming an entry that is missing or that asks for what is not here.
    """
    if (kind := entries.get("model_type")) not in HF_FAMILIES:
        raise UserError(f"model_type is {kind!r}; allowed: {', '.join(HF_FAMILIES)}")
    refused = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "decoder_sparse_step": 1}
    for name, allowed in refused.items():
        if entries.get(name, allowed) != allowed:
            raise UserError(f"{name} is {entries[name]!r}; allowed: {allowed!r}")
    if entries.get("mlp_only_layers"):
        raise UserError(f"mlp_only_layers is {entries['mlp_only_layers']!r}; allowed: an empty list")
    return LlamaConfig(
        **{ours: _entry(entries, theirs) for ours, theirs in FIELDS.items()},
        n_kv_heads=entries.get("num_key_value_heads"),
        head_dim=_head_dim(entries),
        norm_eps=entries.get("rms_norm_eps", 1e-6),
        tied=entries.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        **_rope_fields(entries),
        **_window_fields(entries),
        **_expert_fields(entries),
    )


def _entry(entries: Mapping[str, Any], name: str) -> Any:
    if name not in entries:
        raise UserError(f"config.json has no {name!r}, which a model of type {entries.get('model_type')} needs")
    return entries[name]


def _head_dim(entries: Mapping[str, Any]) -> int | None:
    """None where it is dim / n_heads; a Qwen 3 that does not name it has 128."""
    head_dim: int | None = entries.get("head_dim") or (128 if entries["model_type"] == "qwen3" else None)
    implied = head_dim is not None and head_dim * entries["num_attention_heads"] == entries["hidden_size"]
    return None if implied else head_dim


def _rope_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions stand there in `rope_parameters`, or, before Transformers 5, in two entries."""
    rope = {"rope_theta": entries.get("rope_theta", 10_000.0)}
    rope |= (entries.get("rope_scaling") or {}) | (entries.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type is {kind!r}; allowed: default, llama3")
    scaling = {ours: _entry(rope, theirs) for ours, theirs in ROPE_FIELDS.items()} if kind == "llama3" else {}
    return {"rope_theta": rope["rope_theta"], **scaling}


def _window_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers there have a window must be all, or all but every so-many-th."""
    has_window = entries.get("use_sliding_window", entries["model_type"] in ("mistral", "mixtral"))
    if not has_window or entries.get("sliding_window") is None:
        return {}
    n_layers = _entry(entries, "num_hidden_layers")
    first = entries.get("max_window_layers", 0) if entries["model_type"] in ("qwen2", "qwen3") else 0
    types = entries.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (n_layers - first)
    sees_all = [layer + 1 for layer in range(n_layers) if types[layer] == "full_attention"]
    every = sees_all[0] if sees_all else None
    if every is not None and sees_all != list(range(every, n_layers + 1, every)):
        raise UserError(f"layers {sees_all} have full attention; allowed: none, or every so-many-th")
    return {"sliding_window": entries["sliding_window"], "global_every": every}


def _expert_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    kind = entries["model_type"]
    if kind == "mixtral":
        n_experts, width, normalize = _entry(entries, "num_local_experts"), None, True
    elif kind == "qwen3_moe":
        n_experts = entries.get("num_experts") or _entry(entries, "num_local_experts")
        width, normalize = _entry(entries, "moe_intermediate_size"), entries.get("norm_topk_prob", False)
    else:
        return {}
    chosen = {"n_experts": n_experts, "experts_per_token": _entry(entries, "num_experts_per_tok")}
    return chosen | {"expert_hidden_dim": width, "normalize_router_weights": normalize}


def names_in_huggingface(config: LlamaConfig) -> dict[str, str]:
    """Our parameter names to those in Hugging Face's files.

    Experts' matrices are stacked here and apart there: such a name has ``{}`` in the place of the expert's number.

    Raises:
        UserError: no kind of model there has these fields.
    """
    parts = {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        **_mlp_names(model_type(config)),
    }
    for ours in ("query", "key", "value"):
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts[f"attention.{ours}.{kind}"] = f"self_attn.{ours[0]}_proj.{kind}"
    if config.qk_norm:
        parts |= {f"attention.{ours}_norm.weight": f"self_attn.{ours[0]}_norm.weight" for ours in ("query", "key")}
    names = {"token_embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    for layer in range(config.n_layers):
        names |= {f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    return names if config.tied else names | {"head.weight": "lm_head.weight"}


def _mlp_names(kind: str) -> dict[str, str]:
    """The parameters of a block's MLP or experts, in a model of this kind."""
    if kind == "mixtral":
        experts = {"gate": "w1", "up": "w3", "down": "w2"}
        names = {f"mlp.{ours}": f"block_sparse_moe.experts.{{}}.{theirs}.weight" for ours, theirs in experts.items()}
        return names | {"mlp.router.weight": "block_sparse_moe.gate.weight"}
    if kind == "qwen3_moe":
        names = {f"mlp.{part}": f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")}
        return names | {"mlp.router.weight": "mlp.gate.weight"}
    return {f"mlp.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def from_huggingface(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the tensors in Hugging Face's files.

    Raises:
        UserError: a tensor is missing, or no kind of model there has these fields.
    """
    converted = {}
    for ours, theirs in names_in_huggingface(config).items():
        apart = [theirs.format(expert) for expert in range(config.n_experts or 1)] if "{}" in theirs else [theirs]
        if missing := [name for name in apart if name not in weights]:
            raise UserError(f"the weights have no {missing[0]!r}, which a model of type {model_type(config)} needs")
        tensors = [weights[name] for name in apart]
        converted[ours] = torch.stack(tensors) if "{}" in theirs else tensors[0]
    return converted


def to_huggingface(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Hugging Face's files from our state dict; a tied head is left out, as it is there.

    Raises:
        UserError: no kind of model there has these fields.
    """
    converted = {}
    for ours, theirs in names_in_huggingface(config).items():
        stacked = "{}" in theirs
        for expert, tensor in enumerate(weights[ours] if stacked else [weights[ours]]):
            converted[theirs.format(expert)] = tensor.contiguous()
    return converted


# GGUF


GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""llama.cpp's name of an architecture, by Hugging Face's of the kind of Llama that a model is."""


def add_gguf_sizes(writer: Any, config: LlamaConfig) -> None:
    """Writes the sizes of a model into a GGUF file."""
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads())
    writer.add_key_length(config.head_size())
    writer.add_value_length(config.head_size())
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size())
    if config.n_experts is not None:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.expert_features())


def gguf_tensors(config: LlamaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """By Hugging Face's names, with the matrices of all experts stacked, as here."""
    pairs_are_neighbours = GGUF_ARCHITECTURES[model_type(config)] == "llama"
    heads = {"attention.query.weight": config.n_heads, "attention.key.weight": config.kv_heads()}
    tensors = {}
    for ours, theirs in names_in_huggingface(config).items():
        tensor, name = weights[ours], ".".join(ours.split(".")[2:])
        if pairs_are_neighbours and name in heads:
            tensor = _neighbours(tensor, heads[name])
        tensors[theirs.replace(".{}", "")] = tensor
    return tensors


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows `(heads x head_dim, dim)` in an order that puts those side by side that a rotary position turns together."""
    return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).flatten(0, 2)


def rope_stretching(config: LlamaConfig) -> Tensor:
    """By what each rotary wavelength is multiplied `(head_dim / 2,)`, float32."""
    device = torch.device("cpu")
    plain = dataclasses.replace(config, rope_factor=None)
    return rope_frequencies(plain, device) / rope_frequencies(config, device)
