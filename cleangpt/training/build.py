"""Puts a trainer together: from an experiment and its dataset to the parts that `Trainer` calls."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from cleangpt.checkpoints.checkpoint import Checkpoints
from cleangpt.checkpoints.run_folder import experiment_json
from cleangpt.checkpoints.snapshots import Snapshots
from cleangpt.config import FineTuningConfig
from cleangpt.corpora.mixture import environments
from cleangpt.data.loader import DatasetSource
from cleangpt.data.mixing import MixedDataset, mean_shares, split_samples
from cleangpt.distributed.device import (
    RandomState,
    autocast,
    can_compile,
    choose_device,
    compile_blocks,
    compute_dtype,
    keep_freed_memory,
    peak_flops,
    seed_everything,
    set_fp32_precision,
    uncompiled,
    use_fp8,
)
from cleangpt.distributed.layout import Layout, choose_layout, state_bytes
from cleangpt.distributed.parallelize import apply_activation_checkpointing, parallelize, wrap_ddp
from cleangpt.distributed.processes import Ranks
from cleangpt.evaluation.tasks import mean_reward
from cleangpt.evaluation.validate import loss_metrics, source_metrics
from cleangpt.experiment import Experiment
from cleangpt.inference.text import sample_text
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.tracking import NullTracker, Trackers, create_trackers
from cleangpt.tracking.metrics import metric_key
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.balancing import ExpertLoadBalancer
from cleangpt.training.deadline import WRITE_RATE, Deadline
from cleangpt.training.early_stopping import EarlyStopping
from cleangpt.training.finetuning import freeze_and_add_lora, frozen_names, lr_factors, start_from
from cleangpt.training.meter import Meter
from cleangpt.training.metrics import Recorder, Row, StepLog, Throughput
from cleangpt.training.mup import mup_scales, scale_init
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.recovery import Health, Recovery, SpikeDetector
from cleangpt.training.resolve import open_stream, planned_steps
from cleangpt.training.saving import Saver
from cleangpt.training.schedules import step_plan
from cleangpt.training.state import Length, Position, TrainState
from cleangpt.training.stopping import Stopping
from cleangpt.training.trainer import Trainer
from cleangpt.training.validator import Validator

POINTS = 1000
"""Approximate number of rows of steps.jsonl in a complete run, unless `tracking.every` is set."""


@dataclass(frozen=True)
class PlacedModel:
    """A model on its devices."""

    model: LanguageModel
    forward_model: LanguageModel
    """The module to call in training: compiled, and wrapped in DDP if it is used."""
    layout: Layout
    device: torch.device
    autocast: AbstractContextManager[Any]


def build_trainer(
    experiment: Experiment, run: Path, dataset: MixedDataset, progress: ProgressBar, ranks: Ranks | None = None,
    end: float | None = None, validate: bool = True,
) -> Trainer:  # fmt: skip
    """Builds the trainer of a run, restored from its newest snapshot.

    Args:
        experiment: resolved and checked.
        run: its folder.
        dataset: of its corpus.
        progress: shows the progress.
        ranks: the processes; None: a single one.
        end: deadline by which the run must have saved and ended, in seconds since 1970; None: no deadline.
        validate: whether to validate.

    Raises:
        UserError: its snapshot, or the weights it starts from, are missing or corrupt.
    """
    ranks = ranks or Ranks()
    training, log = experiment.training, progress.log
    placed = place_model(experiment, ranks, log)
    model, layout, device = placed.model, placed.layout, placed.device
    length = Length(experiment.data.batch_size, training.batches_per_macro_batch, training.num_macro_batches)
    micro_batch_size = training.micro_batch_size or experiment.data.batch_size // layout.dp_size
    source = open_source(experiment, dataset, layout, ranks, device)
    optimizer = build_optimizer(experiment, model)
    trackers = NullTracker(run) if not ranks.is_main else create_trackers(
        experiment.tracking, run, experiment.name, experiment_json(experiment), log
    )  # fmt: skip
    checkpoints = Checkpoints(
        run / "checkpoints", experiment.saving, ranks, experiment.model, dataset.tokenizer,
        experiment.fine_tuning.lora, dataset.chat_template, log,
    )  # fmt: skip
    position, meter, spikes = Position(), Meter(device, ranks), SpikeDetector(training, ranks)
    early_stopping = EarlyStopping(experiment.early_stopping)
    state = TrainState(
        {
            "position": position,
            "meter": meter,
            "model": model,
            "optimizer": optimizer,
            "source": source,
            "early_stopping": early_stopping,
            "spikes": spikes,
            "checkpoints": checkpoints,
            "trackers": trackers,
            "random": RandomState(device, ranks),
        }
    )
    snapshots = Snapshots(run / "snapshots", experiment.saving, ranks, experiment.parallel.timeout, log)
    saver = Saver(run, state, position, length, snapshots, ranks, log)
    resumed = saver.restore() is not None
    if not resumed and experiment.init_from is not None:
        start_from(
            experiment.init_from, model, optimizer, experiment.model, dataset.tokenizer, ranks, snapshots.group, log,
            with_moments=experiment.fine_tuning.optimizer_state == "kept",
        )  # fmt: skip
    trackers.open(*(position.macro_batch, position.step) if resumed else (None, None))
    validator = build_validator(experiment, dataset, placed, ranks, micro_batch_size) if validate else None
    recovery = Recovery(
        spikes, Health(model, optimizer, ranks, training.max_skipped_steps), saver, source, trackers, position, length
    )
    recorder = build_recorder(experiment, dataset, placed, ranks, trackers, progress, source, validator)
    deadline = Deadline(end, state_bytes(model) / WRITE_RATE)
    return Trainer(
        run=run, model=model, forward_model=placed.forward_model, objective=experiment.objective, source=source,
        optimizer=optimizer,
        balancer=ExpertLoadBalancer(model, ranks.sum_tensor, frozen_names(model, experiment.fine_tuning)),
        validator=validator, plan=partial(step_plan, experiment), length=length, micro_batch_size=micro_batch_size,
        snapshot_every=experiment.saving.snapshot_every, device=device, autocast=placed.autocast, layout=layout,
        ranks=ranks, position=position, meter=meter, spikes=spikes, recovery=recovery, saver=saver,
        checkpoints=checkpoints, recorder=recorder,
        stopping=Stopping(early_stopping, deadline, ranks, length, log),
    )  # fmt: skip


def place_model(experiment: Experiment, ranks: Ranks, log: Callable[[str], None]) -> PlacedModel:
    """The model with its initial weights, on its devices, with the configured precision and compilation."""
    training, parallel, tuning = experiment.training, experiment.parallel, experiment.fine_tuning
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    device = choose_device(training.device, ranks.local_rank)
    keep_freed_memory(device)
    seed_everything(training.seed)
    set_fp32_precision(training.precision)
    layout = choose_layout(parallel, experiment.model, ranks, device, partial(freeze_and_add_lora, config=tuning))
    compiled = training.compile if can_compile(device) else "off"
    if compiled != training.compile:
        log(f"training.compile is {training.compile}, but no compiler was found; training without")
    dtype = compute_dtype(device, training.precision)
    gathered = layout.shards > 1 and dtype == torch.bfloat16
    model = parallelize(
        lambda: build_model(experiment.model, experiment.objective.heads), layout, device,
        lambda plain: _prepare(plain, training.precision, tuning, training.recompute_every, compiled == "blocks"),
        gather_dtype=dtype if gathered else None, reshard_after_forward=parallel.reshard_after_forward,
        timeout=ranks.timeout,
    )  # fmt: skip
    model.loss_chunk = training.loss_chunk
    called = cast(LanguageModel, torch.compile(model)) if compiled == "model" else model
    forward_model = wrap_ddp(called, layout, device)
    scale_init(model, mup_scales(experiment.model, experiment.optimizer))
    if ranks.world_size > 1:
        seed_everything(training.seed + ranks.rank)  # dropout differs between processes
    return PlacedModel(model, forward_model, layout, device, autocast(device, torch.float32 if gathered else dtype))


def _prepare(
    model: LanguageModel, precision: str, tuning: FineTuningConfig, recompute_every: int | None, compiled: bool
) -> None:
    """Changes a plain model in place before it is sharded."""
    if precision == "fp8":
        use_fp8(model)
    freeze_and_add_lora(model, tuning)
    apply_activation_checkpointing(model, recompute_every)
    if compiled:
        compile_blocks(model)


def open_source(
    experiment: Experiment, dataset: MixedDataset, layout: Layout, ranks: Ranks, device: torch.device
) -> DatasetSource:
    """The training batches of this process."""
    return DatasetSource(
        open_stream(experiment, dataset), experiment.data.batch_size, prefetch=experiment.data.prefetch,
        pin_memory=device.type == "cuda", rank=layout.dp_rank(ranks.rank), world_size=layout.dp_size,
    )  # fmt: skip


def build_optimizer(experiment: Experiment, model: LanguageModel) -> Optimizer:
    """AdamW, with Muon for some parameters, and the learning-rate factors of the experiment."""
    config = experiment.optimizer
    scales = mup_scales(experiment.model, config)
    return Optimizer(
        model, config, scale_loss=experiment.training.precision == "fp16",
        factors=lr_factors(model, config, experiment.fine_tuning.layer_decay),
        mup_scales={name: scale.lr for name, scale in scales.items()},
    )  # fmt: skip


def build_validator(
    experiment: Experiment, dataset: MixedDataset, placed: PlacedModel, ranks: Ranks, micro_batch_size: int
) -> Validator:
    """Validation on the val split of every source."""
    data = experiment.data
    return Validator(
        placed.forward_model, experiment.objective, split_samples(dataset, "val", data.seq_len), mean_shares(dataset),
        batch_size=data.val_batch_size or micro_batch_size, limit=data.val_samples, layout=placed.layout, ranks=ranks,
        device=placed.device, autocast=placed.autocast,
    )  # fmt: skip


def build_recorder(
    experiment: Experiment, dataset: MixedDataset, placed: PlacedModel, ranks: Ranks, trackers: Trackers,
    progress: ProgressBar, source: DatasetSource, validator: Validator | None,
) -> Recorder:  # fmt: skip
    """The recorder of metrics for trackers and progress bar."""
    model, device, tracking = placed.model, placed.device, experiment.tracking
    splits = {source.name: source.dataset.splits["val"] for source in dataset.sources}
    found = environments(experiment.corpus, dataset) if tracking.score_samples else {}

    def validation_metrics(val_loss: float) -> Row:
        if validator is None:
            return loss_metrics(val_loss, splits.get(""))
        others = {f"val_{name}": value for name, value in validator.mean_metrics().items() if name != "loss"}
        by_source = source_metrics("val_loss", validator.losses(), splits)
        perplexity = loss_metrics(val_loss, splits.get("")) if experiment.objective.per_token else {}
        return {**others, **perplexity, **by_source}

    def scores() -> Row:
        if not found:
            return {}
        model.eval()
        with uncompiled(experiment.training.compile):
            return {
                metric_key(environment.metric, name): mean_reward(
                    model, environment, "val", tracking.score_samples, device
                )
                for name, environment in found.items()
            }

    def sample(macro_batch: int) -> str:
        first = dataset.sources[0].dataset
        with uncompiled(experiment.training.compile):
            return sample_text(model, first, tracking.sample_prompt, tracking.sample_tokens, device, macro_batch)

    seq_len = experiment.data.seq_len
    every = tracking.every or max(1, planned_steps(experiment) // POINTS)
    return Recorder(
        trackers, progress, StepLog(every, seq_len, trackers, ranks),
        Throughput(seq_len, flops_per_token(model, seq_len), peak_flops(device), ranks.world_size),
        source, ranks, device, validation_metrics, scores, sample if tracking.sample_tokens else None,
    )  # fmt: skip
