"""Puts a model on its devices, with the configured precision, compilation and parallelism."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from cleangpt.config import FineTuningConfig, TrainingConfig
from cleangpt.distributed.device import (
    autocast,
    can_compile,
    choose_device,
    compile_blocks,
    compute_dtype,
    keep_freed_memory,
    seed_everything,
    set_fp32_precision,
    use_fp8,
)
from cleangpt.distributed.layout import Layout, choose_layout
from cleangpt.distributed.parallelize import apply_activation_checkpointing, parallelize, wrap_ddp
from cleangpt.distributed.processes import Ranks
from cleangpt.experiment import Experiment
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.llama import LlamaConfig
from cleangpt.training.finetuning import freeze_and_add_lora
from cleangpt.training.mup import mup_scales, scale_init


@dataclass(frozen=True)
class PlacedModel:
    """A model on its devices."""

    model: LanguageModel
    forward_model: LanguageModel
    """The module to call in training: compiled, and wrapped in DDP if it is used."""
    layout: Layout
    device: torch.device
    autocast: AbstractContextManager[Any]


def place_model(experiment: Experiment, ranks: Ranks, log: Callable[[str], None]) -> PlacedModel:
    """The model with its initial weights, on its devices, with the configured precision and compilation."""
    training, parallel, tuning = experiment.training, experiment.parallel, experiment.fine_tuning
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    device = choose_device(training.device, ranks.local_rank)
    keep_freed_memory(device)
    seed_everything(training.seed)
    set_fp32_precision(training.precision)
    heads, freeze = experiment.objective.heads, partial(freeze_and_add_lora, config=tuning)
    layout = choose_layout(parallel, experiment.model, ranks, device, freeze, heads)
    compiled = training.compile if can_compile(device) else "off"
    if compiled != training.compile:
        log(f"training.compile is {training.compile}, but no compiler was found; training without")
    masked = isinstance(experiment.model, LlamaConfig) and experiment.model.has_masks
    if compiled == "model" and device.type == "cuda" and masked:
        compiled = "blocks"  # what makes FlexAttention's blocks cannot be compiled together with what uses them
    dtype = compute_dtype(device, training.precision)
    gathered = layout.shards > 1 and dtype == torch.bfloat16
    model = parallelize(
        lambda: build_model(experiment.model, heads), layout, device,
        lambda plain: _prepare(plain, training, tuning, compiled == "blocks"),
        gather_dtype=dtype if gathered else None, reshard_after_forward=parallel.reshard_after_forward,
        timeout=ranks.timeout,
    )  # fmt: skip
    set_scoring(model, experiment, layout, compiled)
    called = cast(LanguageModel, torch.compile(model)) if compiled == "model" else model
    forward_model = wrap_ddp(called, layout, device)
    scale_init(model, mup_scales(experiment.model, experiment.optimizer, heads))
    if ranks.world_size > 1:
        seed_everything(training.seed + ranks.rank)  # dropout differs between processes
    return PlacedModel(model, forward_model, layout, device, autocast(device, torch.float32 if gathered else dtype))


def _prepare(model: LanguageModel, training: TrainingConfig, tuning: FineTuningConfig, compiled: bool) -> None:
    """Changes a plain model in place before it is sharded."""
    if training.precision == "fp8":
        use_fp8(model)
    freeze_and_add_lora(model, tuning)
    apply_activation_checkpointing(model, training.recompute_every, training.recompute == "selective")
    if compiled:
        compile_blocks(model)


def set_scoring(model: LanguageModel, experiment: Experiment, layout: Layout, compiled: str) -> None:
    """Tells a model how its scores of targets are computed: in chunks, as sampled, with prompts of answers shared."""
    training, objective = experiment.training, experiment.objective
    model.loss_chunk = training.loss_chunk
    model.compiles_scores = compiled == "blocks" and model.gather_logits is None
    if objective.on_policy:
        model.temperature = experiment.rollouts.temperature
    # A compiled model wants one shape; recomputation and FSDP, blocks that are called once. Dropout is drawn per row.
    plain = training.compile == "off" and training.recompute_every is None and not layout.sharded
    dropout = getattr(experiment.model, "dropout", 0.0) or experiment.fine_tuning.lora.dropout
    model.shares_prompts = (
        objective.scores_answers and plain and not dropout and next(model.parameters()).device.type == "cpu"
    )
