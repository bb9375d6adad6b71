"""From an experiment to a run: check, prepare, resolve, open, build, train."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cleangpt.checkpoints.run_folder import (
    check_folder,
    check_registered,
    choose_folder,
    find_moments,
    given_folder,
)
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.config import Schedule, peak
from cleangpt.corpora import Corpus, Mixture, prepare
from cleangpt.corpora.mixture import environments
from cleangpt.data.columns import Column
from cleangpt.data.mixing import MixedDataset, split_samples
from cleangpt.data.records import Records
from cleangpt.distributed.device import check_precision, choose_device
from cleangpt.distributed.layout import (
    Layout,
    check_compilation,
    check_devices,
    check_loss_chunk,
    layout_for,
)
from cleangpt.distributed.processes import Ranks, join, local_rank, world_size
from cleangpt.distributed.signals import SAVE_SIGNAL, ignore_signal
from cleangpt.errors import UserError
from cleangpt.evaluation.reference import Reference, add_reference
from cleangpt.evaluation.tasks import choose_tasks
from cleangpt.experiment import Experiment, total_samples
from cleangpt.files import user_path
from cleangpt.inference.text import start_of_sample
from cleangpt.interchange.huggingface import find
from cleangpt.models import model_class
from cleangpt.models.vectors import check_vectors, vector_inputs
from cleangpt.models.vision import check_images, check_preparation, image_inputs, vision_of
from cleangpt.objectives.pairs import REFERENCE
from cleangpt.rollouts.build import check_rollouts
from cleangpt.rollouts.collecting import check_prompts
from cleangpt.screen import Screen
from cleangpt.tracking import check_tracking
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.build import open_trainer
from cleangpt.training.finetuning import check_parameters
from cleangpt.training.resolve import open_stream, resolve, resolve_with
from cleangpt.training.sources import only_environment
from cleangpt.training.summary import length_asked, next_commands, summary

__all__ = ["check", "check_here", "prepare_dataset", "resolve", "train"]


def train(
    experiment: Experiment,
    *,
    source: Path | None = None,
    overrides: Sequence[str] = (),
    deadline: float | None = None,
    resumed: Path | None = None,
) -> Path:
    """Trains an experiment, preparing its corpus if needed; an existing run folder is resumed.

    Args:
        experiment: what to train.
        source: its Python file, copied into the run.
        overrides: command-line arguments after the experiment, saved so that the run can be repeated.
        deadline: time by which it must have saved and ended, in seconds since 1970; None: no deadline.
        resumed: the run to resume, whatever fields it had before; None: that of `experiment.run_dir`, or a new one.

    Returns:
        The folder of the run.

    Raises:
        UserError: a field, or the source of initial weights, is wrong; nothing has been created.
        RunFailedError: the run cannot continue.
    """
    check_here(experiment)
    # SIGUSR1 asks to save; until there is something to save, it would kill the process.
    with ignore_signal(SAVE_SIGNAL), join(experiment.parallel.timeout) as ranks:
        if deadline is not None:
            deadline = float(ranks.across_restarts("end", str(deadline)))
        asked = length_asked(experiment)
        experiment, dataset = prepare_dataset(experiment, ranks, resumed)
        run: Path = resumed or ranks.on_main(lambda: choose_folder(experiment))
        progress = ProgressBar(None, experiment.tracking.progress and ranks.is_main)
        with open_trainer(
            experiment, run, dataset, progress, ranks, end=deadline, resumed=resumed is not None, source=source,
            overrides=overrides,
        ) as trainer:  # fmt: skip
            for line in summary(experiment, run, dataset, trainer.model, trainer.device, trainer.layout) + asked:
                progress.log(line)
            status = trainer.train()
    if status == "interrupted":
        progress.log(f"interrupted and saved; to continue: {shlex.join(['cleangpt', 'resume', str(run)])}")
        return run
    for line in [f"{status}; next:", *next_commands(experiment, run, source)]:
        progress.log(line)
    return run


def prepare_dataset(
    experiment: Experiment, ranks: Ranks, resumed: Path | None = None
) -> tuple[Experiment, MixedDataset]:
    """Prepares the dataset if needed; returns the experiment, resolved and checked with it, and the dataset."""
    console = Screen(stderr=True, quiet=not ranks.is_main)
    dataset = ranks.main_process_first(lambda: _open_dataset(experiment, resumed, console))
    experiment = resolve_with(experiment, dataset)
    check(experiment, layout_for(experiment.parallel, ranks.world_size), dataset=dataset)
    return experiment, dataset


def _open_dataset(experiment: Experiment, resumed: Path | None, console: Screen) -> MixedDataset:
    """The dataset, with the log-probabilities of a reference if the objective reads them."""
    dataset = prepare(experiment.corpus, user_path(experiment.data.folder), console=console)
    if REFERENCE in experiment.objective.reads:
        run = resumed or given_folder(experiment)
        device = choose_device(experiment.training.device, local_rank())
        source, precision = experiment.init_from, experiment.training.precision
        add_reference(dataset, None if source is None else Reference(source, precision, device), run)
    return dataset


# Checks --------------------------------------------------------------------------------------------------------------
def check_here(experiment: Experiment) -> None:
    """`check` for this machine's processes and device, before the corpus is read."""
    layout = layout_for(experiment.parallel, world_size())
    check_devices(choose_device(experiment.training.device), world_size())
    check(experiment, layout, choose_device(experiment.training.device, local_rank()))


def check(
    experiment: Experiment,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    device: torch.device | None = None,
    dataset: MixedDataset | None = None,
) -> None:
    """Checks that the parts of an experiment fit together; each part has checked itself.

    Args:
        experiment: resolved, if there is a `dataset`.
        layout: how processes share the model and each batch.
        device: of this process; None: for planning only.
        dataset: the prepared dataset; None: not prepared yet.

    Raises:
        UserError: one line naming the fields, their values and what is allowed.
    """
    _check_sizes(experiment, layout)
    _check_optimization(experiment)
    _check_fine_tuning(experiment)
    _check_unused_head(experiment, layout)
    check_loss_chunk(experiment.training, experiment.model, layout)
    if device is not None:
        _check_corpus(experiment)
        check_folder(experiment)
        check_precision(experiment.training.precision, device)
        check_compilation(experiment.training.compile, layout, device)
        check_registered(experiment)
        check_tracking(experiment.tracking)
        _check_source(experiment)
    on_policy = experiment.objective.on_policy
    if on_policy:
        check_rollouts(
            experiment.rollouts, experiment.data, experiment.training, experiment.schedule.batch_size, experiment.model,
            experiment.fine_tuning.lora, layout, experiment.saving.best,
        )  # fmt: skip
    if dataset is not None:
        if (tokens := total_samples(experiment) * experiment.data.seq_len) >= 2**63:
            raise UserError(f"the run has {tokens:,} tokens; allowed: less than 2**63")
        if on_policy:
            check_prompts(only_environment(experiment, dataset), experiment.data.seq_len + 1)
        else:
            split_samples(dataset, "val", experiment.data.seq_len)
            open_stream(experiment, dataset)
            _check_groups(experiment, layout, dataset.group)
        _check_columns(experiment, dataset.columns, dataset.records)
        _check_scoring(experiment, dataset)
        check_parameters(
            experiment.fine_tuning, experiment.model, experiment.optimizer, layout, experiment.objective.heads
        )


def _check_sizes(experiment: Experiment, layout: Layout) -> None:
    """Checks the sizes of sequence, batch, micro-batch and step."""
    data, model, training = experiment.data, experiment.model, experiment.training
    if layout.tensor > 1 and vision_of(model).encoder == "gato":
        raise UserError(
            f"tensor parallelism is over {layout.tensor} devices; allowed with model.vision.encoder 'gato', which each "
            "would draw other positions for: 1; use strategy fsdp or ddp"
        )
    if model.max_seq_len is not None and data.seq_len > model.max_seq_len:
        raise UserError(
            f"data.seq_len is {data.seq_len}; allowed: at most model.max_seq_len, which is {model.max_seq_len}"
        )
    if data.batch_size % layout.dp_size:
        raise UserError(f"data.batch_size is {data.batch_size}; allowed: a multiple of the {layout.dp_size} devices")
    per_device = data.batch_size // layout.dp_size
    if training.micro_batch_size is not None and per_device % training.micro_batch_size:
        raise UserError(
            f"training.micro_batch_size is {training.micro_batch_size}; "
            f"allowed: a divisor of the {per_device} samples of a batch on one device"
        )
    largest = training.accumulation * peak(experiment.schedule.batch_size)
    if round(largest) > training.batches_per_macro_batch:
        raise UserError(
            f"training.accumulation reaches {round(largest)} batches a step; allowed: at most "
            f"training.batches_per_macro_batch, which is {training.batches_per_macro_batch}"
        )


def _check_corpus(experiment: Experiment) -> None:
    """Checks the corpus itself, and its row length against the sample length."""
    corpus, seq_len = experiment.corpus, experiment.data.seq_len
    if not isinstance(corpus, Corpus | Mixture):
        raise UserError(f"corpus is a {type(corpus).__name__}; allowed: a subclass of cleangpt.corpora.Corpus")
    corpus.check()
    row_length = getattr(corpus, "row_length", None)
    if row_length is not None and seq_len != row_length - 1 and not experiment.objective.on_policy:
        raise UserError(f"data.seq_len is {seq_len}; allowed: {row_length - 1}, the corpus's row length - 1")
    for one in [source.corpus for source in corpus.sources] if isinstance(corpus, Mixture) else [corpus]:
        if image_inputs(experiment.model):
            check_preparation(experiment.model, vars(one))


def _check_groups(experiment: Experiment, layout: Layout, group: tuple[str, ...]) -> None:
    """Checks that the corpus groups rows as the objective compares them, and that no size splits a group."""
    data, training, objective = experiment.data, experiment.training, experiment.objective
    if objective.group and objective.group != group:
        kind, found = type(objective).__name__, f"has {' and '.join(group)}" if group else "has none"
        raise UserError(f"objective {kind} compares rows, {' and '.join(objective.group)}; this corpus {found}")
    sizes = {
        "data.batch_size": (data.batch_size, layout.dp_size), "data.val_batch_size": (data.val_batch_size, 1),
        "training.micro_batch_size": (training.micro_batch_size, 1), "data.val_samples": (data.val_samples, 1),
    }  # fmt: skip
    for name, (size, devices) in sizes.items():
        if group and size is not None and size % (len(group) * devices):
            raise UserError(
                f"{name} is {size}; allowed: a multiple of {len(group) * devices}, so that rows stay together: "
                f"{', '.join(group)}"
            )
    rates = {f"model.{name}": value for name, value in vars(experiment.model).items() if name.endswith("dropout")}
    rates["fine_tuning.lora.dropout"] = experiment.fine_tuning.lora.dropout
    if REFERENCE in objective.reads and any(rates.values()):
        name, value = next((name, value) for name, value in rates.items() if value)
        raise UserError(
            f"{name} is {value}; allowed with objective {type(objective).__name__}: 0, as for its reference"
        )


def _check_columns(experiment: Experiment, columns: Mapping[str, Column], records: Mapping[str, Records]) -> None:
    """Checks that batches have what model and objective read, and that the model can have the objective's heads."""
    inputs = {name for name, column in columns.items() if column.role == "input"} | records.keys()
    objective, kind = experiment.objective, type(experiment.objective).__name__
    if missing := [] if objective.on_policy else sorted(objective.reads - (columns.keys() - inputs)):
        raise UserError(f"objective {kind} reads {missing[0]!r}, which the batches of this corpus do not have")
    model = model_class(experiment.model)
    if missing := sorted(model.inputs - inputs):
        raise UserError(f"model {model.__name__} reads {missing[0]!r}, which the batches of this corpus do not have")
    check_images(experiment.model, records)
    check_vectors(experiment.model, records)
    if unknown := sorted(inputs - model.inputs - image_inputs(experiment.model) - vector_inputs(experiment.model)):
        raise UserError(f"the batches of this corpus have the input {unknown[0]!r}; {model.__name__} does not read it")
    if objective.heads and not hasattr(experiment.model, "dim"):
        raise UserError(f"objective {kind} needs a head, and {type(experiment.model).__name__} has no dim to make one")


def _check_scoring(experiment: Experiment, dataset: MixedDataset) -> None:
    """Checks what a run samples and scores after a macro-batch, by starting on it."""
    tracking = experiment.tracking
    if tracking.sample_tokens:
        try:
            start_of_sample(dataset.sources[0].dataset, tracking.sample_prompt)
        except UserError as error:
            raise UserError(f"tracking.sample_prompt is {tracking.sample_prompt!r}: {error}") from None
    found = environments(experiment.corpus, dataset) if tracking.score_samples else {}
    for environment in found.values():
        count = environment.tasks("val")
        if not count:
            kind = type(environment).__name__
            raise UserError(
                f"tracking.score_samples is {tracking.score_samples}; allowed: 0, since {kind} has no tasks of val"
            )
        environment.reset("val", choose_tasks(count, tracking.score_samples)[0])


def _check_optimization(experiment: Experiment) -> None:
    """Checks schedules and optimizer."""
    for name in ("lr", "weight_decay", "batch_size"):
        schedule: Schedule = getattr(experiment.schedule, name)
        if schedule.shape == "wsd" and schedule.warmup + schedule.decay > 1:
            raise UserError(
                f"schedule.{name}.decay is {schedule.decay}; allowed: at most 1 - warmup, "
                f"which is {1 - schedule.warmup:g}"
            )
    optimizer, rank = experiment.optimizer, experiment.fine_tuning.lora.rank
    if optimizer.muon.lr is not None and optimizer.lr == 0:
        raise UserError(f"optimizer.lr is {optimizer.lr}; allowed with optimizer.muon.lr: more than 0")
    if optimizer.base_dim is not None and rank is not None:
        raise UserError(
            f"optimizer.base_dim is {optimizer.base_dim}; allowed with fine_tuning.lora.rank: None, since adapters "
            "have the same rank at any width"
        )


def _check_fine_tuning(experiment: Experiment) -> None:
    """Checks frozen parameters, adapters and moments against each other and `init_from`."""
    tuning, source, rank = experiment.fine_tuning, experiment.init_from, experiment.fine_tuning.lora.rank
    if REFERENCE in experiment.objective.reads and source is None:
        kind = type(experiment.objective).__name__
        raise UserError(f"init_from is None; allowed with objective {kind}: a model, since it is the reference")
    if rank is not None and source is None:
        raise UserError(f"fine_tuning.lora.rank is {rank}; allowed without init_from: None, since weights are random")
    if experiment.encoder_from is not None and not image_inputs(experiment.model):
        raise UserError(
            f"encoder_from is {experiment.encoder_from!r}; allowed for a model without model.vision.encoder: None"
        )
    if rank is not None and tuning.freeze:
        raise UserError(
            f"fine_tuning.freeze is {tuning.freeze!r}; allowed with fine_tuning.lora.rank: (), since adapters alone "
            "train"
        )
    if tuning.optimizer_state == "kept" and (source is None or rank is not None):
        why = "without init_from" if source is None else "with fine_tuning.lora.rank, since adapters are new"
        raise UserError(f"fine_tuning.optimizer_state is 'kept'; allowed {why}: reset")


def _check_unused_head(experiment: Experiment, layout: Layout) -> None:
    """Checks that a language-model head of its own, which gets no gradient, is frozen where gradients are reduced."""
    untied = vars(experiment.model).get("tied") is False and experiment.fine_tuning.lora.rank is None
    frozen = not {"head.*", "head.weight"}.isdisjoint(experiment.fine_tuning.freeze)
    if untied and not experiment.objective.predicts and layout.dp_size > 1 and not frozen:
        kind = type(experiment.objective).__name__
        raise UserError(
            f"fine_tuning.freeze is {experiment.fine_tuning.freeze!r}; allowed with objective {kind} on several "
            "devices: with 'head.*', since the untied head gets no gradient"
        )


def _check_source(experiment: Experiment) -> None:
    """Checks that the initial weights exist; a resumed run does not need them any more."""
    run = given_folder(experiment)
    begun = run is not None and list_snapshots(run / "snapshots")
    if begun:
        return
    if experiment.encoder_from is not None:
        find(experiment.encoder_from)
    if experiment.init_from is None:
        return
    find(experiment.init_from)
    if experiment.fine_tuning.optimizer_state == "kept":
        find_moments(experiment.init_from)
