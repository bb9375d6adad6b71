"""Puts a trainer together: from an experiment and its dataset to the parts that `Trainer` calls."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from cleangpt.checkpoints.checkpoint import Checkpoints
from cleangpt.checkpoints.run_folder import acquire_run, check_data, experiment_json, record_run
from cleangpt.checkpoints.snapshots import Snapshots
from cleangpt.corpora.mixture import environments
from cleangpt.data.mixing import MixedDataset, mean_shares, split_samples
from cleangpt.data.source import BatchSource
from cleangpt.distributed.device import (
    RandomState,
    peak_flops,
    uncompiled,
)
from cleangpt.distributed.layout import state_bytes
from cleangpt.distributed.processes import Ranks
from cleangpt.evaluation.control import score_environments
from cleangpt.evaluation.validate import loss_metrics, source_metrics
from cleangpt.experiment import Experiment
from cleangpt.inference.text import sample_text, save_sample_images
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.rollouts.source import RolloutSource
from cleangpt.tracking import NullTracker, Trackers, create_trackers
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.balancing import ExpertLoadBalancer
from cleangpt.training.deadline import WRITE_RATE, Deadline
from cleangpt.training.early_stopping import EarlyStopping
from cleangpt.training.finetuning import frozen_names, lr_factors, start_encoder, start_from
from cleangpt.training.meter import Meter
from cleangpt.training.metrics import Recorder, Row, StepLog, Throughput
from cleangpt.training.mup import mup_scales
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.placing import PlacedModel, place_model
from cleangpt.training.recovery import Health, Recovery, SpikeDetector
from cleangpt.training.resolve import planned_steps
from cleangpt.training.saving import Saver
from cleangpt.training.schedules import step_plan
from cleangpt.training.sources import open_source
from cleangpt.training.state import Length, Position, TrainState
from cleangpt.training.stopping import Stopping
from cleangpt.training.trainer import Trainer
from cleangpt.training.validator import Validator

POINTS = 1000
"""Approximate number of rows of steps.jsonl in a complete run, unless `tracking.every` is set."""


@contextlib.contextmanager
def open_trainer(
    experiment: Experiment, run: Path, dataset: MixedDataset, progress: ProgressBar, ranks: Ranks, *,
    end: float | None = None, validate: bool = True, resumed: bool = False, source: Path | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[Trainer]:  # fmt: skip
    """Locks a run while it is built and trained. What refuses it leaves its folder as it was: files are written last.

    Args:
        experiment: see `build_trainer`, like the next four and `end` and `validate`.
        run: its folder, from `choose_folder`.
        dataset: of its corpus.
        progress: shows the progress.
        ranks: the processes.
        end: deadline.
        validate: whether to validate.
        resumed: whether fields may differ from those that the run has, as `check_resumable` allows.
        source: the experiment's Python file, copied into a new run; None: not copied.
        overrides: command-line arguments after the experiment, saved in a new run.

    Raises:
        UserError: another process is training the run, it has another experiment or other data, or cannot be built.
    """
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(acquire_run(run, experiment, resumed)))
        data = ranks.on_main(lambda: check_data(run, dataset))
        trainer = build_trainer(experiment, run, dataset, progress, ranks, end, validate)
        ranks.on_main(lambda: record_run(run, experiment, data, source, overrides))
        progress.write_to(run if ranks.is_main else None)
        yield trainer


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
    optimizer = build_optimizer(experiment, model)
    trackers = NullTracker(run) if not ranks.is_main else create_trackers(
        experiment.tracking, run, experiment.name, experiment_json(experiment), log
    )  # fmt: skip
    source = open_source(experiment, dataset, placed, ranks, log, trackers.answers)
    checkpoints = Checkpoints(
        run / "checkpoints", experiment.saving, ranks, experiment.model, dataset.tokenizer,
        experiment.fine_tuning.lora, dataset.chat_template, log,
    )  # fmt: skip
    position, meter, spikes = Position(), Meter(device, ranks), SpikeDetector(training, ranks)
    early_stopping = EarlyStopping(experiment.early_stopping, experiment.saving.best.startswith("highest"))
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
    if not resumed and experiment.encoder_from is not None:
        start_encoder(experiment.encoder_from, model, experiment.model, log)
    validate = validate and not experiment.objective.on_policy  # whose validation are the scores of tasks
    validator = build_validator(experiment, dataset, placed, ranks, micro_batch_size) if validate else None
    recovery = Recovery(
        spikes, Health(model, optimizer, ranks, training.max_skipped_steps), saver, source, trackers, position, length
    )
    recorder = build_recorder(experiment, run, dataset, placed, ranks, trackers, progress, source, validator)
    deadline = Deadline(end, state_bytes(model) / WRITE_RATE)
    # Last, since it drops what the files have of later steps: whatever refuses to resume leaves them as they were.
    trackers.open(*(position.macro_batch, position.step) if resumed else (None, None))
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


def build_optimizer(experiment: Experiment, model: LanguageModel) -> Optimizer:
    """AdamW, with Muon for some parameters, and the learning-rate factors of the experiment."""
    config = experiment.optimizer
    scales = mup_scales(experiment.model, config, experiment.objective.heads)
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
    experiment: Experiment, run: Path, dataset: MixedDataset, placed: PlacedModel, ranks: Ranks, trackers: Trackers,
    progress: ProgressBar, source: BatchSource, validator: Validator | None,
) -> Recorder:  # fmt: skip
    """The recorder of metrics for trackers and progress bar."""
    model, device, tracking = placed.model, placed.device, experiment.tracking
    splits = {source.name: source.dataset.splits["val"] for source in dataset.sources}
    found = environments(experiment.corpus, dataset) if tracking.score_samples else {}

    def validation_metrics(val_loss: float) -> Row:
        if experiment.objective.on_policy:
            return {}
        perplexity = loss_metrics(val_loss, splits.get("")) if experiment.objective.per_token else {}
        own = {"val_loss": val_loss, **perplexity}
        if validator is None:
            return own
        others = {f"val_{name}": value for name, value in validator.mean_metrics().items() if name != "loss"}
        by_source = source_metrics("val_loss", validator.losses(), splits)
        return {**own, **others, **by_source}

    def scores() -> Row:
        if not found:
            return {}
        model.eval()
        with uncompiled(experiment.training.compile):
            return dict(score_environments(model, found, "val", tracking.score_samples, device, dataset.vocab_size))

    def sample(macro_batch: int) -> str:
        if isinstance(source, RolloutSource):
            return "\n".join(source.examples)
        first = dataset.sources[0].dataset
        if tracking.sample_prompt is None:
            ranks.on_main(lambda: save_sample_images(first, run))
        with uncompiled(experiment.training.compile):
            return sample_text(model, first, tracking.sample_prompt, tracking.sample_tokens, device, macro_batch)

    seq_len = experiment.data.seq_len
    every = tracking.every or max(1, planned_steps(experiment) // POINTS)
    return Recorder(
        trackers, progress, StepLog(every, seq_len, trackers, ranks),
        Throughput(seq_len, flops_per_token(model, seq_len), peak_flops(device), ranks.world_size),
        source, ranks, device, validation_metrics, scores, sample if tracking.sample_tokens else None,
        experiment.saving.best,
    )  # fmt: skip
