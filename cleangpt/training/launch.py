"""From an experiment to a run: check, prepare, resolve, open, build, train."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cleangpt.checkpoints.run_folder import acquire_run, check_folder, find_moments, open_run
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.config import LENGTHS, FineTuningConfig, Schedule, peak
from cleangpt.corpora import Corpus, Mixture, prepare
from cleangpt.data.dataset import Column
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
from cleangpt.experiment import Experiment, total_samples
from cleangpt.interchange.huggingface import find
from cleangpt.models import model_class
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.rollouts.build import check_rollouts
from cleangpt.rollouts.collecting import check_prompts
from cleangpt.tracking import check_tracking
from cleangpt.tracking.metrics import metric_key
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.build import build_trainer, only_environment
from cleangpt.training.finetuning import check_fine_tuning
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
        experiment, store = prepare_dataset(experiment, ranks)
        run: Path = resumed or ranks.on_main(lambda: open_run(experiment, source, overrides))
        progress = ProgressBar(run if ranks.is_main else None, experiment.tracking.progress and ranks.is_main)
        with ExitStack() as held:
            ranks.on_main(lambda: held.enter_context(acquire_run(run, experiment, store)))
            trainer = build_trainer(experiment, run, store, progress, ranks, deadline)
            for line in summary(experiment, run, store, trainer.model, trainer.device, trainer.layout) + asked:
                progress.log(line)
            status = trainer.train()
    if status == "interrupted":
        progress.log(f"interrupted and saved; to continue: cleangpt resume {run}")
    else:
        progress.log(f"{status}; next: cleangpt evaluate {run}, cleangpt sample {run}, cleangpt report {run}")
    return run


def prepare_dataset(experiment: Experiment, ranks: Ranks) -> tuple[Experiment, MixedDataset]:
    """Prepares the dataset if needed; returns the experiment, resolved and checked with it, and the dataset."""
    store = ranks.main_process_first(lambda: prepare(experiment.corpus, Path(experiment.data.folder)))
    experiment = resolve_with(experiment, store)
    check(experiment, layout_for(experiment.parallel, ranks.world_size), store=store)
    return experiment, store


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
    check_loss_chunk(experiment.training, experiment.model, layout)
    if device is not None:
        _check_corpus(experiment)
        check_folder(experiment)
        check_precision(experiment.training.precision, device)
        check_compilation(experiment.training.compile, layout, device)
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
        _check_columns(experiment, store.columns)
        check_fine_tuning(experiment.fine_tuning, experiment.model, experiment.optimizer, layout)


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


def _check_source(experiment: Experiment) -> None:
    """Checks that the initial weights exist; a resumed run does not need them any more."""
    begun = experiment.run_dir is not None and list_snapshots(Path(experiment.run_dir) / "snapshots")
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
        f"memory   about {(state + activations) / 2**30:.2f} GiB: weights, gradients and moments "
        f"{state / 2**30:.2f}, activations {activations / 2**30:.2f}",
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
        words = f"{name}: {100 * share:.2f} % of the samples, " if name else ""
        tokens = part.splits["train"].tokens
        lines.append(
            f"data     {words}{tokens:,} training tokens in {part.folder}, {times:.2f} times visited at the end"
        )
    return lines
