"""Architectures by name: one file each with a subclass of `LanguageModel`; registering is one line here."""

from collections.abc import Collection

from cleangpt.config import ModelConfig
from cleangpt.models.base import LanguageModel
from cleangpt.models.gato import Gato, GatoConfig
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import Llama, LlamaConfig

MODELS: dict[str, tuple[type[ModelConfig], type[LanguageModel]]] = {
    "gato": (GatoConfig, Gato),
    "gpt": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}


def model_kinds() -> dict[str, type[ModelConfig]]:
    """The configuration class of every registered architecture, by name."""
    return {name: config for name, (config, _) in MODELS.items()}


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """The architecture of a configuration."""
    for config_class, architecture in MODELS.values():
        if type(config) is config_class:
            return architecture
    raise TypeError(f"{type(config).__name__} is not registered in MODELS")


def build_model(config: ModelConfig, heads: Collection[str] = ()) -> LanguageModel:
    """An untrained model with additional scalar `heads`; the configuration's `vocab_size` is not None."""
    model = model_class(config)(config)
    if heads:
        model.add_heads(heads)
    return model
