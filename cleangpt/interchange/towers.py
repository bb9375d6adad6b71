"""Vision towers as Hugging Face stores them, CLIP's and SigLIP's, and the processors that prepare pictures for them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cleangpt.checkpoints.checkpoint import CONFIG
from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json, write_json
from cleangpt.hub import local_path
from cleangpt.interchange.weights import read_weights
from cleangpt.models.vision import VisionConfig

PROCESSOR, WHOLE_PROCESSOR = "preprocessor_config.json", "processor_config.json"
"""Files with the entries of an image processor: its own, or since Transformers 5 that of the whole processor."""

FIELDS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "channels": "num_channels",
    "patch_size": "patch_size",
    "norm_eps": "layer_norm_eps",
}
"""Fields of `VisionConfig` and their names in the `config.json` of a tower."""

_COMMON = {"num_channels": 3, "num_hidden_layers": 12, "intermediate_size": 3072, "image_size": 224}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _COMMON
    | {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 32}
    | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _COMMON | _SIGLIP | {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 16},
    "idefics3_vision": _COMMON | _SIGLIP | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
    "smolvlm_vision": _COMMON | _SIGLIP | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
}
"""What Transformers takes for an entry that `config.json` leaves out, by `model_type`."""
WITH_TEXT = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Models of pictures and texts, of which the tower is read."""
TOWERS = (*WITH_TEXT, *WITH_TEXT.values())
"""Values of `model_type` in files that a tower is read from."""

ACTIVATIONS = {
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "gelu": ("gelu",),
    "quick_gelu": ("quick_gelu",),
}
"""Values of `VisionConfig.activation` and their names in `config.json`; the first is written."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the channels, where a processor leaves them out (Radford et al. 2021)."""
RESAMPLES = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers of interpolations."""


# Configuration --------------------------------------------------------------------------------------------------------
def vision_from_huggingface(entries: Mapping[str, Any], blocks: int | None = None) -> VisionConfig:
    """The configuration of a tower, without projector, from the content of its `config.json`.

    Args:
        entries: of the tower.
        blocks: that features pass through, as `vision_feature_layer` counts them, without a norm after the last; None:
            all, and the norm.

    Raises:
        UserError: an entry is missing, or has a value that is not supported.
    """
    if (kind := entries.get("model_type")) not in DEFAULTS:
        raise UserError(f"vision_config.model_type is {kind!r}; allowed: {', '.join(DEFAULTS)}")
    entries = DEFAULTS[kind] | dict(entries)
    activations = {hf_name: name for name, hf_names in ACTIVATIONS.items() for hf_name in hf_names}
    if (activation := entries["hidden_act"]) not in activations:
        raise UserError(f"vision_config.hidden_act is {activation!r}; allowed: {', '.join(activations)}")
    if not isinstance(side := entries["image_size"], int):
        raise UserError(f"vision_config.image_size is {side!r}; allowed: a whole number")
    fields = {name: entries[hf_name] for name, hf_name in FIELDS.items()}
    if blocks is not None:
        reached = blocks if blocks >= 0 else fields["n_layers"] + 1 + blocks
        if not 1 <= reached <= fields["n_layers"]:
            raise UserError(f"vision_feature_layer is {blocks}; allowed for {fields['n_layers']} blocks: one of them")
        fields["n_layers"] = reached
    clip = kind == "clip_vision_model"
    return VisionConfig(
        **fields, encoder="vit", height=side, width=side, activation=activations[activation],  # type: ignore[arg-type]
        class_token=clip, final_norm=blocks is None, **_prepared_as(clip),
    )  # fmt: skip


def _prepared_as(clip: bool) -> dict[str, Any]:
    """How pictures are prepared where a processor does not say."""
    return {"mean": CLIP_MEAN, "std": CLIP_STD, "resize": "crop"} if clip else {"mean": (0.5,), "std": (0.5,)}


def vision_to_huggingface(vision: VisionConfig, kind: str) -> dict[str, Any]:
    """The content of the `config.json` of a tower of this `model_type`.

    Raises:
        UserError: no tower of Hugging Face's is like it.
    """
    if vision.height != vision.width:
        raise UserError(
            f"model.vision.width is {vision.width}; allowed for a model that is exported: model.vision.height, which "
            f"is {vision.height}"
        )
    entries = {hf_name: getattr(vision, name) for name, hf_name in FIELDS.items()}
    entries |= {"model_type": kind, "image_size": vision.height, "intermediate_size": vision.hidden_size}
    entries |= {"vision_use_head": False} if kind == "siglip_vision_model" else {}
    return entries | {"hidden_act": ACTIVATIONS[vision.activation][0]}


# Weights --------------------------------------------------------------------------------------------------------------
def tower_names(vision: VisionConfig) -> dict[str, str]:
    """Names of a tower's parameters within `ViT`, and Hugging Face's within a `vision_model`."""
    patches = "patch_embedding"
    names = {f"{patches}.weight": f"embeddings.{patches}.weight"}
    names["position_embedding.weight"] = "embeddings.position_embedding.weight"
    norms = {}
    if vision.class_token:
        names["class_embedding"] = "embeddings.class_embedding"
        norms["input_norm"] = "pre_layrnorm"
    else:
        names[f"{patches}.bias"] = f"embeddings.{patches}.bias"
    if vision.final_norm:
        norms["final_norm"] = "post_layernorm"
    parts = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    parts |= {f"attention.{part}": f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
    parts["attention.out"] = "self_attn.out_proj"
    for layer in range(vision.n_layers):
        norms |= {f"blocks.{layer}.{part}": f"encoder.layers.{layer}.{hf_part}" for part, hf_part in parts.items()}
    for name, hf_name in norms.items():
        names |= {f"{name}.{kind}": f"{hf_name}.{kind}" for kind in ("weight", "bias")}
    return names


def read_vision(source: str) -> VisionConfig:
    """How the tower of CLIP or SigLIP ``hf:NAME_OR_FOLDER`` reads images, for an experiment that starts from it.

    With all its blocks and, for SigLIP, the norm after them, and a projector of one layer.

    Raises:
        UserError: there is none, or it is not supported.
    """
    folder = local_path(source)
    if (entries := _tower_entries(folder)) is None:
        raise UserError(f"{folder} has no tower of CLIP or SigLIP; allowed: one of {', '.join(TOWERS)}")
    vision = vision_from_huggingface(entries)
    return with_processor(replace(vision, final_norm=not vision.class_token), folder)


def read_tower(folder: Path, vision: VisionConfig) -> tuple[VisionConfig, dict[str, Tensor]] | None:
    """The configuration and weights of a tower, by our names, as far as a model of `vision` has them; None: the folder
    is of another model.

    Raises:
        UserError: a weight is missing.
    """
    if (entries := _tower_entries(folder)) is None:
        return None
    with parsing(folder / CONFIG):
        found = with_processor(vision_from_huggingface(entries), folder)
    stored, weights = read_weights(folder), dict[str, Tensor]()
    for name, hf_name in tower_names(replace(vision, class_token=found.class_token)).items():
        tensor = stored.get(f"vision_model.{hf_name}", stored.get(hf_name))
        if tensor is None:
            raise UserError(f"{folder} has no {hf_name}, which the encoder of model.vision needs")
        weights[f"vision.encoder.{name}"] = tensor
    return found, weights


def _tower_entries(folder: Path) -> dict[str, Any] | None:
    """The content of the `config.json` of a tower, or of that within a model of pictures and texts."""
    content = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind in WITH_TEXT:
        return {"model_type": WITH_TEXT[kind]} | dict(content.get("vision_config") or {})
    return content if kind in TOWERS else None


# Preparation of pictures ----------------------------------------------------------------------------------------------
def with_processor(vision: VisionConfig, folder: Path) -> VisionConfig:
    """The configuration with what a folder's image processor says of mean, deviation and size.

    Raises:
        UserError: it prepares pictures in a way that is not supported.
    """
    for name in (WHOLE_PROCESSOR, PROCESSOR):
        if (folder / name).is_file():
            with parsing(folder / name):
                content = read_json(folder / name)
                entries = content.get("image_processor", content if name == PROCESSOR else None)
                if entries is not None:
                    return _processed(vision, entries)
    return vision


def _processed(vision: VisionConfig, entries: Mapping[str, Any]) -> VisionConfig:
    allowed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False}
    if "max_image_size" in entries:  # Idefics3's; they pad batches
        allowed.pop("do_pad")
        vision = _tiled(vision, entries)
        crop, size = False, {"height": vision.height, "width": vision.width}
    else:
        crop, size = entries.get("do_center_crop", vision.resize == "crop"), dict(entries.get("size") or {})
    for name, value in allowed.items():
        if entries.get(name, value) not in (None, value):
            raise UserError(f"{name} is {entries[name]!r}; allowed: {value}")
    given = entries.get("crop_size") if crop else size
    given = given if isinstance(given, dict) and given else dict.fromkeys(("height", "width"), given or vision.height)
    sides = {given.get("height"), given.get("width"), size.get("shortest_edge", vision.height)}
    if sides != {vision.height}:
        raise UserError(f"pictures become {dict(given)}, from {size}; allowed: {vision.height}, as in config.json")
    resamples = {number: name for name, number in RESAMPLES.items()}
    number = entries.get("resample", RESAMPLES[vision.resample])
    if number not in resamples:
        raise UserError(f"resample is {number!r}; allowed: {', '.join(map(str, resamples))}")
    mean, std = (tuple(entries.get(f"image_{name}", getattr(vision, name))) for name in ("mean", "std"))
    mean, std = (values[:1] if len(set(values)) == 1 else values for values in (mean, std))
    return replace(
        vision, mean=mean, std=std, resize="crop" if crop else "stretch",
        resample=resamples[number],  # type: ignore[arg-type]
    )  # fmt: skip


def _tiled(vision: VisionConfig, entries: Mapping[str, Any]) -> VisionConfig:
    """The configuration with what the processor of Idefics3 or SmolVLM says of tiles."""
    side, longest = _longest_edge(entries, "max_image_size", vision.height), _longest_edge(entries, "size", 4 * 364)
    if side != vision.height:
        raise UserError(f"max_image_size is {side!r}; allowed: {vision.height}, as in config.json")
    return replace(vision, longest_edge=longest, tiles=bool(entries.get("do_image_splitting", True)))


def _longest_edge(entries: Mapping[str, Any], name: str, default: int) -> Any:
    """The longest edge that an entry of a processor names."""
    edges = entries.get(name) or {"longest_edge": default}
    if not isinstance(edges, dict) or "longest_edge" not in edges:
        raise UserError(f"{name} is {edges!r}; allowed: its longest_edge")
    return edges["longest_edge"]


def write_processor(vision: VisionConfig, folder: Path) -> None:
    """Writes the files of a processor, with which Transformers prepares pictures as here."""
    write_json(folder / PROCESSOR, processor_entries(vision))
    if vision.longest_edge:
        write_json(folder / WHOLE_PROCESSOR, {"processor_class": "Idefics3Processor", "image_seq_len": vision.tokens})


def processor_entries(vision: VisionConfig) -> dict[str, Any]:
    """The content of `preprocessor_config.json`."""
    both = {"height": vision.height, "width": vision.width}
    entries: dict[str, Any] = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": vision.channels == 3,
        "rescale_factor": 1 / 255, "resample": RESAMPLES[vision.resample],
        "image_mean": _by_channel(vision.mean, vision), "image_std": _by_channel(vision.std, vision),
    }  # fmt: skip
    if vision.longest_edge:
        return entries | {
            "image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": vision.tiles, "do_pad": True,
            "size": {"longest_edge": vision.longest_edge}, "max_image_size": {"longest_edge": vision.height},
        }  # fmt: skip
    if vision.resize == "stretch":
        return entries | {"image_processor_type": "SiglipImageProcessor", "size": both}
    cropped = {"do_center_crop": True, "crop_size": both, "size": {"shortest_edge": vision.height}}
    return entries | {"image_processor_type": "CLIPImageProcessor"} | cropped


def _by_channel(values: tuple[float, ...], vision: VisionConfig) -> list[float]:
    return list(values) * (vision.channels if len(values) == 1 else 1)
