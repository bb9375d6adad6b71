"""Models that read images as Hugging Face stores them: LLaVA, and Idefics3, which SmolVLM is as well.

A tower of CLIP or SigLIP, a projector, and a model of text that `interchange/llama.py` converts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.interchange import llama
from cleangpt.interchange.towers import tower_names, vision_from_huggingface, vision_to_huggingface
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import VisionConfig

LLAVA, IDEFICS = "llava", "idefics3"
HF_FAMILIES = (LLAVA, IDEFICS, "smolvlm")
"""Hugging Face's `model_type` of such models."""
PREFIXES = {
    LLAVA: {"text": "language_model.", "tower": "vision_tower.", "projector": "multi_modal_projector."},
    IDEFICS: {"text": "model.text_model.", "tower": "model.vision_model.", "projector": "model.connector."},
}
"""What the names of the parts' weights begin with; LLaVA's may have ``model.`` before, and ``vision_model.`` after."""
UNUSED_WEIGHTS = r"(model\.)?(vision_tower|vision_model)\..*"
"""Blocks of a tower behind those that features pass through, and its pooling head."""


# Configuration --------------------------------------------------------------------------------------------------------
def config_from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """The configuration from the content of Hugging Face's `config.json`.

    Raises:
        UserError: an entry is missing, or has a value that is not supported.
    """
    text, tower = dict(entries.get("text_config") or {}), dict(entries.get("vision_config") or {})
    text.setdefault("model_type", "llama")
    tied = entries.get("tie_word_embeddings") or (entries["model_type"] == LLAVA and text.get("tie_word_embeddings"))
    if entries["model_type"] == LLAVA:
        tower.setdefault("model_type", "clip_vision_model")
        vision = _llava_vision(entries, tower)
    else:
        tower.setdefault("model_type", "idefics3_vision")
        text = {"rms_norm_eps": 1e-5} | text
        vision = replace(
            vision_from_huggingface(tower), merge=entries.get("scale_factor", 2), projector_bias=False,
            resample="lanczos",
        )  # fmt: skip
    config = llama.config_from_huggingface(text | {"tie_word_embeddings": bool(tied)})
    hidden = config.dim if entries["model_type"] == LLAVA else None
    return replace(config, vision=replace(vision, projector_dim=hidden))


def _llava_vision(entries: Mapping[str, Any], tower: Mapping[str, Any]) -> VisionConfig:
    if not isinstance(layer := entries.get("vision_feature_layer", -2), int):
        raise UserError(f"vision_feature_layer is {layer!r}; allowed: a whole number")
    vision = vision_from_huggingface(tower, layer)
    allowed = {
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
    }
    for name, value in allowed.items():
        default = "gelu" if name == "projector_hidden_act" else "default"
        if (given := entries.get(name, default)) != value:
            raise UserError(f"{name} is {given!r}; allowed with {tower['model_type']}: {value!r}")
    return replace(vision, projector_bias=entries.get("multimodal_projector_bias", True))


def family(config: LlamaConfig) -> str:
    """Hugging Face's `model_type` of a configuration.

    Raises:
        UserError: neither family has such an encoder.
    """
    vision = config.vision
    if vision.encoder != "vit" or vision.bidirectional:
        name = "bidirectional" if vision.encoder == "vit" else "encoder"
        value = vars(vision)[name]
        raise UserError(f"model.vision.{name} is {value!r}; allowed for a model that is exported: a vit, causal")
    if not vision.final_norm and vision.merge == 1 and vision.projector_dim == config.dim and not vision.longest_edge:
        return LLAVA
    if vision.final_norm and not vision.class_token and not vision.projector_bias and vision.projector_dim is None:
        return IDEFICS
    raise UserError(
        "model.vision is neither LLaVA's (final_norm False, merge 1, projector_dim = model.dim, longest_edge 0) nor "
        "Idefics3's (final_norm True, class_token False, projector_bias False, projector_dim None); allowed for a "
        "model that is exported: one of them"
    )


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The content of Hugging Face's `config.json`, with special tokens set to None.

    Raises:
        UserError: Hugging Face has no such model.
    """
    kind, vision, text = family(config), config.vision, llama.config_to_huggingface(_text(config))
    common = {"model_type": kind, "text_config": text, "tie_word_embeddings": config.tied}
    if kind == IDEFICS:
        tower = vision_to_huggingface(vision, "idefics3_vision")
        return common | {
            "architectures": ["Idefics3ForConditionalGeneration"], "vision_config": tower, "scale_factor": vision.merge,
        }  # fmt: skip
    tower = vision_to_huggingface(vision, "clip_vision_model" if vision.class_token else "siglip_vision_model")
    return common | {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": tower,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
        "image_seq_length": vision.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": vision.projector_bias,
    }


def _text(config: LlamaConfig) -> LlamaConfig:
    return replace(config, vision=VisionConfig())


# Weights --------------------------------------------------------------------------------------------------------------
def names_in_huggingface(config: LlamaConfig) -> dict[str, tuple[str, str]]:
    """Our parameter names, and the part and Hugging Face's name of each in that part."""
    names = {name: ("text", hf_name) for name, hf_name in llama.names_in_huggingface(_text(config)).items()}
    names |= {f"vision.encoder.{name}": ("tower", hf_name) for name, hf_name in tower_names(config.vision).items()}
    layers = {"up": "linear_1", "down": "linear_2"}
    if family(config) == IDEFICS:
        layers = {"down": "modality_projection.proj"}
    for name, hf_name in layers.items():
        for kind in ("weight", "bias") if config.vision.projector_bias else ("weight",):
            names[f"vision.encoder.projector.{name}.{kind}"] = ("projector", f"{hf_name}.{kind}")
    return names


def hf_names(kind: str, part: str, name: str) -> list[str]:
    """The names under which a weight may be stored, first that which is written."""
    prefix = PREFIXES[kind][part]
    if kind == IDEFICS:
        return [name if name.startswith("lm_head") else prefix + name.removeprefix("model.")]
    if part == "text":  # from Transformers 4.52 to 5 as in memory
        later = name if name.startswith("lm_head") else f"model.{prefix}{name.removeprefix('model.')}"
        return [prefix + name, later]
    within = [f"{prefix}vision_model.{name}", prefix + name] if part == "tower" else [prefix + name]
    return within + [f"model.{one}" for one in within]


def used_weights(config: LlamaConfig) -> set[str]:
    """Hugging Face's names of the weights that are read."""
    kind, found = family(config), set[str]()
    for part, hf_name in names_in_huggingface(config).values():
        found.update(*(hf_names(kind, part, name) for name in llama.of_all_experts(config, hf_name)))
    return found


def from_huggingface(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from Hugging Face's.

    Raises:
        UserError: a tensor is missing.
    """
    kind, parts, converted = family(config), dict[str, Tensor](), dict[str, Tensor]()
    for name, (part, pattern) in names_in_huggingface(config).items():
        for hf_name in llama.of_all_experts(config, pattern):
            stored = next((one for one in hf_names(kind, part, hf_name) if one in weights), None)
            if stored is None:
                first = hf_names(kind, part, hf_name)[0]
                raise UserError(f"the weights have no {first!r}, which a model of type {kind} needs")
            if part == "text":
                parts[hf_name] = weights[stored]
            else:
                converted[name] = weights[stored]
    return llama.from_huggingface(_text(config), parts) | converted


def to_huggingface(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's state dict from ours, without a tied head; with a norm that no feature passes through, if ours has
    none after the last block.

    Raises:
        UserError: Hugging Face has no such model.
    """
    kind, text = family(config), llama.to_huggingface(_text(config), weights)
    converted = {hf_names(kind, "text", name)[0]: tensor for name, tensor in text.items()}
    for name, (part, hf_name) in names_in_huggingface(config).items():
        if part != "text":
            converted[hf_names(kind, part, hf_name)[0]] = weights[name].contiguous()
    if not config.vision.final_norm:
        for name, fill in (("weight", 1.0), ("bias", 0.0)):
            norm = torch.full((config.vision.dim,), fill, dtype=weights["token_embedding.weight"].dtype)
            converted[hf_names(kind, "tower", f"post_layernorm.{name}")[0]] = norm
    return converted


def gguf_architecture(config: LlamaConfig) -> str:
    """Raises UserError: llama.cpp reads encoders from files of their own, which are not written."""
    raise UserError("model.vision.encoder is set; allowed in GGUF: None, without images; --format hf writes them")
