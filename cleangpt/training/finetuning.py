"""Fine-tuning: frozen parameters, LoRA, layer-wise learning rates; applied from outside the model (design rule 7)."""

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from cleangpt.checkpoints.checkpoint import Checkpoint, config_mismatches, load_matching_weights
from cleangpt.checkpoints.run_folder import find_moments
from cleangpt.checkpoints.snapshots import fill_tensors, saved_shapes
from cleangpt.config import FineTuningConfig, LoRAConfig, ModelConfig, OptimizerConfig
from cleangpt.data.tokenizers import Tokenizer, same_tokens
from cleangpt.distributed.layout import Layout
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import load_weights
from cleangpt.errors import UserError, nearest
from cleangpt.interchange.huggingface import find, open_checkpoint
from cleangpt.interchange.towers import read_tower
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.blocks import block_numbers, hidden_matrices
from cleangpt.models.lora import add_adapter, is_adapter, linear_layers
from cleangpt.models.meta import on_meta
from cleangpt.models.vision import VisionConfig, vision_of
from cleangpt.training.mup import mup_scales
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.saving import find_newest


# What trains ---------------------------------------------------------------------------------------------------------
def freeze_and_add_lora(model: LanguageModel, config: FineTuningConfig) -> None:
    """Adds LoRA adapters and freezes parameters: they get no gradient, no moments and no decay.

    Raises:
        UserError: a pattern matches nothing, or everything would be frozen.
    """
    lora = config.lora
    if lora.rank is not None:
        layers = linear_layers(model)
        for name in _adapted(model, lora, layers):
            add_adapter(layers[name], lora)
    frozen = frozen_names(model, config)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"fine_tuning.freeze is {config.freeze!r}; allowed: patterns that leave a parameter to train")


def _adapted(model: LanguageModel, lora: LoRAConfig, layers: Mapping[str, nn.Linear]) -> set[str]:
    """The names of the linear `layers` that get adapters: those that match, or without patterns those in blocks."""
    if lora.targets:
        return matching(lora.targets, layers, "fine_tuning.lora.targets", "linear layer")
    in_blocks = block_numbers(model)
    if not (found := {name for name in layers if f"{name}.weight" in in_blocks}):
        raise UserError(
            f"fine_tuning.lora.targets is (); allowed for {type(model).__name__}, whose layers() have no linear layer: "
            f"patterns that match one of {', '.join(layers) or 'none'}"
        )
    return found


def frozen_names(model: LanguageModel, config: FineTuningConfig) -> set[str]:
    """The names of frozen parameters: those matching `freeze`, or with LoRA everything but adapters and scalar heads.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if config.lora.rank is not None:
        return {name for name in names if not is_adapter(name) and not name.startswith("heads.")}
    return matching(config.freeze, names, "fine_tuning.freeze", "parameter")


def matching(patterns: Iterable[str], names: Collection[str], field: str, what: str) -> set[str]:
    """The names that match any of the patterns.

    Raises:
        UserError: a pattern matches nothing; suggests the nearest name.
    """
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if fnmatchcase(name, pattern)}
        if not mine:
            first = ", ".join(dict.fromkeys(name.split(".")[0] for name in names)) or "nothing"
            hint = nearest(pattern, [*names, *_folders(names)]) or f"; names begin with {first}"
            raise UserError(f"{field}: {pattern!r} matches no {what}{hint}")
        found |= mine
    return found


def _folders(names: Iterable[str]) -> set[str]:
    """A pattern for everything inside each module."""
    parts = [name.split(".") for name in names]
    return {".".join([*words[:end], "*"]) for words in parts for end in range(1, len(words))}


# Learning rates -----------------------------------------------------------------------------------------------------
def lr_factors(model: LanguageModel, config: OptimizerConfig, layer_decay: float) -> dict[str, float]:
    """The factor on each parameter's learning rate: its layer's factor times that of the first matching pattern.

    Raises:
        UserError: a pattern matches no parameter, or the model has no layers.
    """
    by_layer = layer_factors(model, layer_decay)
    by_name: dict[str, float] = {}
    for pattern, factor in reversed(config.lr_factors):
        by_name |= dict.fromkeys(matching([pattern], by_layer, "optimizer.lr_factors", "parameter"), factor)
    return {name: factor * by_name.get(name, 1.0) for name, factor in by_layer.items()}


def layer_factors(model: LanguageModel, decay: float) -> dict[str, float]:
    """Layer-wise learning rates: `decay` to the power of the number of layers above a parameter.

    Howard and Ruder 2018, "Universal language model fine-tuning", section 3.2. Each of the model's `layers()` is one;
    embeddings, and everything else before them, are the lowest layer; everything after them is the highest.

    Raises:
        UserError: the model has no layers.
    """
    if decay == 1:
        return {name: 1.0 for name, _ in model.named_parameters()}
    numbers, blocks = block_numbers(model), len(model.layers())
    if not blocks:
        raise UserError(
            f"fine_tuning.layer_decay is {decay}; allowed for {type(model).__name__}, whose layers() are empty: 1"
        )
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}
    factors: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        before = id(parameter) in embeddings or not numbers.keys() & factors.keys()
        above = blocks - numbers[name] if name in numbers else blocks + 1 if before else 0
        factors[name] = decay**above
    return factors


# At the start ---------------------------------------------------------------------------------------------
def check_parameters(
    tuning: FineTuningConfig, config: ModelConfig, optimizer: OptimizerConfig, layout: Layout,
    heads: Collection[str] = (),
) -> None:  # fmt: skip
    """Checks that a model, whose vocabulary is known, has the parameters that fields speak of, before anything is
    created: name patterns, layers, hidden matrices for Muon. The objective's scalar `heads` are among them.

    Raises:
        UserError: one line naming the field.
    """
    if tuning.lora.rank is not None and layout.tensor > 1:
        raise UserError(
            f"fine_tuning.lora.rank is {tuning.lora.rank}; allowed with tensor parallelism: None; use strategy fsdp"
        )
    with on_meta():
        model = build_model(config, heads)
    freeze_and_add_lora(model, tuning)
    lr_factors(model, optimizer, tuning.layer_decay)
    if optimizer.muon.lr is not None and not hidden_matrices(model):
        raise UserError(
            f"optimizer.muon.lr is {optimizer.muon.lr}; allowed for {type(model).__name__}, whose layers() have no "
            "matrices: None"
        )
    mup_scales(config, optimizer, heads)


def start_from(
    source: str, model: LanguageModel, optimizer: Optimizer, config: ModelConfig, tokenizer: Tokenizer, ranks: Ranks,
    group: dist.ProcessGroup | None, log: Callable[[str], None], with_moments: bool,
) -> None:  # fmt: skip
    """Loads the matching weights of a run, a checkpoint or a Hugging Face model, and logs those that do not match.

    Args:
        source: as in `Experiment.init_from`.
        model: to be filled; its configuration is `config`, its corpus's tokenizer `tokenizer`.
        optimizer: of the model.
        ranks: all processes call this together.
        group: the process group for reading snapshots.
        log: called with a line about each weight that does not match.
        with_moments: also load the optimizer's moments from the newest snapshot of the run.

    Raises:
        UserError: there is no such source, or no intact snapshot of it.
    """
    checkpoint = open_checkpoint(source)
    same = same_tokens(checkpoint.tokenizer, tokenizer)
    differing = config_mismatches(checkpoint.config, config)
    differing += load_matching_weights(model, checkpoint.weights, same)
    if not same:
        differing.append("its tokenizer is not the corpus's, so token ids may stand for other texts")
    log(f"starting from the weights of {checkpoint.folder}")
    if with_moments:
        snapshot = find_newest(find_moments(source), ranks, log)
        if snapshot is None:
            raise UserError(f"fine_tuning.optimizer_state is 'kept', but every snapshot of {source} is corrupt")
        differing.append(load_moments(optimizer, snapshot, group))
    for line in differing:
        log(f"  {line}")


def start_encoder(source: str, model: LanguageModel, config: ModelConfig, log: Callable[[str], None]) -> None:
    """Loads the weights of an encoder of images into a model that has one like it, and logs what it keeps of its own.

    Args:
        source: as in `Experiment.encoder_from`.
        model: to be filled; a collective if it is sharded.
        config: of the model.
        log: called with a line about each field that differs, and each weight that is not there, such as a projector's.

    Raises:
        UserError: there is no such source, it has no encoder, or one whose weights have other shapes.
    """
    folder = find(source)
    found, there = read_tower(folder, vision_of(config)) or _encoder_of(open_checkpoint(source))
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vision.")}
    for name in sorted(own.keys() & there.keys()):
        if own[name].shape != there[name].shape:
            shapes = f"{tuple(there[name].shape)} there, and {tuple(own[name].shape)}"
            raise UserError(f"encoder_from is {source!r}, whose {name} is {shapes} in the model")
    load_weights(model, {name: tensor for name, tensor in there.items() if name in own}, strict=False)
    log(f"the encoder of images starts from {folder}")
    for name, value in vars(vision_of(config)).items():
        if value != (other := vars(found)[name]):
            log(f"  model.vision.{name} is {value!r}; there it is {other!r}")
    for name in sorted(own.keys() - there.keys()):
        log(f"  {name} is not there; it keeps its values")


def _encoder_of(checkpoint: Checkpoint) -> tuple[VisionConfig, dict[str, Tensor]]:
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if name.startswith("vision.")}
    if not weights:
        raise UserError(f"{checkpoint.folder} reads no images; allowed in encoder_from: a model that does")
    return vision_of(checkpoint.config), weights


def load_moments(optimizer: Optimizer, snapshot: Path, group: dist.ProcessGroup | None) -> str:
    """Loads moments of parameters with equal names and shapes from a snapshot of another run; returns a log line.

    All processes call this together; each reads its shards.
    """
    shapes, moments = saved_shapes(snapshot), optimizer.state_dict()["moments"]
    fitting = {
        name: entry
        for name, entry in moments.items()
        if all(shapes.get(f"optimizer/moments/{name}/{key}") == tensor.shape for key, tensor in entry.items())
    }
    fill_tensors(snapshot, {"optimizer": {"moments": fitting}}, group)
    return f"the optimizer starts with the moments of {len(fitting)} of {len(moments)} parameters from {snapshot}"
