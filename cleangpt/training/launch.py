"""From an experiment to a run: check, prepare, resolve, open, build, train."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cleangpt.checkpoints.run_folder import (
    EXPERIMENT_FILE,
    check_folder,
    check_registered,
    choose_folder,
    find_moments,
    given_folder,
)
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.config import LENGTHS, FineTuningConfig, Schedule, peak
from cleangpt.corpora import Corpus, Mixture, prepare
from cleangpt.corpora.mixture import environments
from cleangpt.data.columns import Column
from cleangpt.data.mixing import MixedDataset, split_samples
from cleangpt.distributed.device import check_precision, choose_device, choose_precision, describe_device
from cleangpt.distributed.layout import (
    Layout,
    check_compilation,
    check_devices,
    check_loss_chunk,
    layout_for,
    state_bytes,
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
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.objectives.pairs import REFERENCE
from cleangpt.rollouts.build import check_rollouts
from cleangpt.rollouts.collecting import check_prompts
from cleangpt.screen import Screen
from cleangpt.tracking import check_tracking
from cleangpt.tracking.metrics import metric_key
from cleangpt.tracking.numbers import show_bytes, show_number
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.build import only_environment, open_trainer
from cleangpt.training.finetuning import check_parameters
from cleangpt.training.resolve import open_stream, resolve, resolve_with

__all__ = ["check", "check_here", "prepare_dataset", "resolve", "summary", "train"]


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
        asked = _length_asked(experiment)
        experiment, store = prepare_dataset(experiment, ranks, resumed)
        run: Path = resumed or ranks.on_main(lambda: choose_folder(experiment))
        progress = ProgressBar(None, experiment.tracking.progress and ranks.is_main)
        with open_trainer(
            experiment, run, store, progress, ranks, end=deadline, resumed=resumed is not None, source=source,
            overrides=overrides,
        ) as trainer:  # fmt: skip
            for line in summary(experiment, run, store, trainer.model, trainer.device, trainer.layout) + asked:
                progress.log(line)
            status = trainer.train()
    if status == "interrupted":
        progress.log(f"interrupted and saved; to continue: {shlex.join(['cleangpt', 'resume', str(run)])}")
        return run
    for line in [f"{status}; next:", *next_commands(experiment, run, source)]:
        progress.log(line)
    return run


def next_commands(experiment: Experiment, run: Path, source: Path | None) -> list[str]:
    """The command lines that show what a run has learned; those for classes of one's own name the file of these."""
    copy = run / EXPERIMENT_FILE
    file = source or (copy if copy.is_file() else Path("FILE.py"))
    code = ["--code", str(file)] if _has_own_classes(experiment) else []
    calls = [["evaluate", str(run), *code], ["sample", str(run), *code], ["report", str(run)]]
    return [f"  {shlex.join(['cleangpt', *words])}" for words in calls]


def _has_own_classes(config: Any) -> bool:
    """Whether a dataclass, or one that it holds, is defined outside CleanGPT."""
    values = [getattr(config, entry.name) for entry in dataclasses.fields(config)]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    own = type(config).__module__.partition(".")[0] != "cleangpt"
    return own or any(_has_own_classes(part) for part in parts if dataclasses.is_dataclass(part))


def prepare_dataset(
    experiment: Experiment, ranks: Ranks, resumed: Path | None = None
) -> tuple[Experiment, MixedDataset]:
    """Prepares the dataset if needed; returns the experiment, resolved and checked with it, and the dataset."""
    console = Screen(stderr=True, quiet=not ranks.is_main)
    store = ranks.main_process_first(lambda: _open_dataset(experiment, resumed, console))
    experiment = resolve_with(experiment, store)
    check(experiment, layout_for(experiment.parallel, ranks.world_size), store=store)
    return experiment, store


def _open_dataset(experiment: Experiment, resumed: Path | None, console: Screen) -> MixedDataset:
    """The dataset, with the log-probabilities of a reference if the objective reads them."""
    store = prepare(experiment.corpus, user_path(experiment.data.folder), console=console)
    if REFERENCE in experiment.objective.reads:
        run = resumed or given_folder(experiment)
        device = choose_device(experiment.training.device, local_rank())
        source, precision = experiment.init_from, experiment.training.precision
        add_reference(store, None if source is None else Reference(source, precision, device), run)
    return store


def _length_asked(experiment: Experiment) -> list[str]:
    """A line about the length of the run, if it is not given in macro-batches."""
    given = {name: value for name in LENGTHS[1:] if (value := getattr(experiment.training, name)) is not None}
    return [f"given    training.{name} {value:,}, rounded up to full macro-batches" for name, value in given.items()]


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
    store: MixedDataset | None = None,
) -> None:
    """Checks that the parts of an experiment fit together; each part has checked itself.

    Args:
        experiment: resolved, if there is a `store`.
        layout: how processes share the model and each batch.
        device: of this process; None: for planning only.
        store: the prepared dataset; None: not prepared yet.

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
    if store is not None:
        if (tokens := total_samples(experiment) * experiment.data.seq_len) >= 2**63:
            raise UserError(f"the run has {tokens:,} tokens; allowed: less than 2**63")
        if on_policy:
            check_prompts(only_environment(experiment, store), experiment.data.seq_len + 1)
        else:
            split_samples(store, "val", experiment.data.seq_len)
            open_stream(experiment, store)
            _check_groups(experiment, layout, store.group)
        _check_columns(experiment, store.columns)
        _check_scoring(experiment, store)
        check_parameters(experiment.fine_tuning, experiment.model, experiment.optimizer, layout)


def _check_sizes(experiment: Experiment, layout: Layout) -> None:
    """Checks the sizes of sequence, batch, micro-batch and step."""
    data, model, training = experiment.data, experiment.model, experiment.training
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


def _check_columns(experiment: Experiment, columns: Mapping[str, Column]) -> None:
    """Checks that batches have what model and objective read, and that the model can have the objective's heads."""
    inputs = {name for name, column in columns.items() if column.role == "input"}
    objective, kind = experiment.objective, type(experiment.objective).__name__
    if missing := [] if objective.on_policy else sorted(objective.reads - (columns.keys() - inputs)):
        raise UserError(f"objective {kind} reads {missing[0]!r}, which the batches of this corpus do not have")
    model = model_class(experiment.model)
    if missing := sorted(model.inputs - inputs):
        raise UserError(f"model {model.__name__} reads {missing[0]!r}, which the batches of this corpus do not have")
    if unknown := sorted(inputs - model.inputs):
        raise UserError(f"the batches of this corpus have the input {unknown[0]!r}; {model.__name__} does not read it")
    if objective.heads and not hasattr(experiment.model, "dim"):
        raise UserError(f"objective {kind} needs a head, and {type(experiment.model).__name__} has no dim to make one")


def _check_scoring(experiment: Experiment, store: MixedDataset) -> None:
    """Checks what a run samples and scores after a macro-batch, by starting on it."""
    tracking = experiment.tracking
    if tracking.sample_tokens:
        try:
            start_of_sample(store.sources[0].dataset, tracking.sample_prompt)
        except UserError as error:
            raise UserError(f"tracking.sample_prompt is {tracking.sample_prompt!r}: {error}") from None
    found = environments(experiment.corpus, store) if tracking.score_samples else {}
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
    if experiment.init_from is None or begun:
        return
    find(experiment.init_from)
    if experiment.fine_tuning.optimizer_state == "kept":
        find_moments(experiment.init_from)


# What is about to happen ---------------------------------------------------------------------------------------------
def summary(
    experiment: Experiment, run: Path, store: MixedDataset, model: LanguageModel, device: torch.device, layout: Layout
) -> list[str]:
    """The summary printed before a run starts: model, memory per device, data, length, device and precision."""
    data, training = experiment.data, experiment.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = f" ({trained:,} of them train)" if experiment.fine_tuning != FineTuningConfig() else ""
    micro_batch = training.micro_batch_size or data.batch_size // layout.dp_size
    state = state_bytes(model) / (layout.shards * layout.tensor)
    activations = float(model.activation_bytes(micro_batch, data.seq_len)) / layout.tensor
    tokens = total_samples(experiment) * data.seq_len
    return [
        f"run      {run}",
        f"model    {parameters:,} parameters{share}, {flops_per_token(model, data.seq_len):,} FLOPs per token",
        f"memory   about {show_bytes(state + activations)}: weights, gradients and moments {show_bytes(state)}, "
        f"activations {show_bytes(activations)}",
        *(_rollout_lines(experiment) if experiment.objective.on_policy else _data_lines(experiment, store)),
        f"length   {training.num_macro_batches} macro-batches of {training.batches_per_macro_batch} batches "
        f"of {data.batch_size} x {data.seq_len} tokens: {tokens:,} tokens",
        f"device   {describe_device(device)}, precision {choose_precision(device, training.precision)}",
    ]


def _rollout_lines(experiment: Experiment) -> list[str]:
    """A line about the rounds of rollouts."""
    config, rounds = experiment.rollouts, total_samples(experiment) // experiment.rollouts.samples
    return [
        f"rollouts {rounds:,} rounds of {config.prompts:,} prompts x {config.completions} answers, {config.passes} "
        f"pass{'es' * (config.passes > 1)} over each; rewards: {', '.join(reward.name for reward in config.rewards)}"
    ]


def _data_lines(experiment: Experiment, store: MixedDataset) -> list[str]:
    """A line for each source: its share of a mixture's samples, its tokens, and how often they are visited."""
    progress = open_stream(experiment, store).progress(total_samples(experiment))
    samples = split_samples(store, "train", experiment.data.seq_len)
    lines = []
    for name, part in ((source.name, source.dataset) for source in store.sources):
        times = progress[metric_key("times_visited", name)]
        share = times * samples[name].num_training / total_samples(experiment)
        words = f"{name}: {show_number(100 * share, 2)} % of the samples, " if name else ""
        tokens = part.splits["train"].tokens
        lines.append(
            f"data     {words}{tokens:,} training tokens in {part.folder}, "
            f"{show_number(times, 2)} times visited at the end"
        )
    return lines
