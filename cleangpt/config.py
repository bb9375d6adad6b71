"""Every hyperparameter of an experiment, as plain dataclasses.

An experiment is a Python file that builds one `Experiment` and calls it `experiment`. Units stand with each field; a
*share of the run* is a number from 0 to 1. What a field may be is checked twice: its type and range here (`check`),
its fit with the other fields in `check_experiment`.
"""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cleangpt.errors import UserError, nearest

T = TypeVar("T")
M = TypeVar("M", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every architecture's configuration has; `models/` holds the architectures."""

    vocab_size: int | None = None
    """Kinds of token; none: as many as the corpus's tokenizer knows. A larger number pads the embedding."""
    max_seq_len: int
    """The longest sequence the model can read, in tokens."""

    def check_fit(self) -> None:
        """Checks what one field demands of another: where there are `n_heads` and `dim`, that one divides the other.

        Raises:
            UserError: one line naming the field, its value and what is allowed.
        """
        heads, dim = getattr(self, "n_heads", 1), getattr(self, "dim", 1)
        if dim % heads:
            raise UserError(f"model.n_heads is {heads}; allowed: a divisor of model.dim, which is {dim}")

    def at_width(self: M, dim: int) -> M:
        """The same model narrower or wider: all widths in proportion, and so many more or fewer heads of one size.

        Raises:
            UserError: the model has no `dim`, or a width or a number of heads would not be whole.
        """
        names = ("dim", "hidden_dim", "expert_hidden_dim", "n_heads", "n_kv_heads")
        widths = {name: width for name in names if (width := getattr(self, name, None)) is not None}
        if "dim" not in widths:
            raise UserError(f"{type(self).__name__} has no model.dim, so its width cannot be changed")
        unit = widths["dim"] // math.gcd(*widths.values())
        if dim < 1 or dim % unit:
            others = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"a width of {dim} does not fit a model of {others}; allowed: multiples of {unit}")
        return dataclasses.replace(self, **{name: width * dim // widths["dim"] for name, width in widths.items()})


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What every corpus's configuration has; `corpora/` holds the corpora."""

    task: ClassVar[str] = ""
    """The score that evaluation computes on this corpus, a name in SCORES; empty: none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of a mixture; see `corpora/mixture.py`."""

    name: str
    """Names its figures, as in val_loss/NAME."""
    corpus: CorpusConfig
    weight: float | tuple[tuple[float, float], ...] = 1.0
    """Its share of the samples, in proportion to the other sources' weights: a number, or points (progress, weight)
    with straight lines between them, progress being a share of the run."""
    max_epochs: int | None = None
    """Passes over its training samples after which the source ends; none: it repeats as long as the run does."""


Shape = Literal["constant", "linear", "cosine", "power", "wsd"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor over the run's progress, multiplied with a base value; see `training/schedules.py`."""

    shape: Shape = "constant"
    """How the factor goes from initial to final after the warm-up."""
    initial: float = 1.0
    """Factor at the end of the warm-up."""
    final: float = 1.0
    """Factor at the end of the run; shape constant ignores it."""
    warmup: float = 0.0
    """Share of the run in which the factor rises linearly from near 0 to initial."""
    decay: float = 0.2
    """Shape wsd: share of the run in which the factor falls from initial to final, at its end."""
    power: float = 2.0
    """Shape power: the exponent; 1 is linear."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What one sample and one batch are."""

    seq_len: int
    """Tokens in a sample."""
    batch_size: int
    """Samples in a batch, over all devices."""
    val_samples: int | None = None
    """Samples validated after each macro-batch (of each source of a mixture), always the same ones; none: the whole
    validation split."""
    val_batch_size: int | None = None
    """Samples validated at a time, by each device; none: a micro-batch. More are faster where the model is small, and
    take less memory than as many in training."""
    prefetch: int = 4
    """Batches loaded ahead of the one in use."""
    folder: str = "data"
    """Where token stores are kept."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon (Jordan et al. 2024) for the matrices in the model's blocks; AdamW keeps the rest."""

    lr: float | None = None
    """Learning rate of these matrices, before the schedule's factor; their updates are as large as AdamW's at the same
    rate. None: AdamW updates them too."""
    momentum: float = 0.95
    """Share of the momentum that a step keeps."""
    iterations: int = 5
    """Of the polynomial that makes an update orthogonal; fewer cost less, and reach it less well."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019), or Muon for some; matrices decay, biases and gains do not."""

    lr: float
    """Learning rate, before the schedule's factor."""
    weight_decay: float = 0.1
    """Decoupled weight decay, before the schedule's factor."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the gradient's first and second moment."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; none: no clipping."""
    muon: MuonConfig = MuonConfig()
    lr_factors: tuple[tuple[str, float], ...] = ()
    """Factors on the learning rates of parameters by a pattern of their names, such as ("head.*", 2.0); a * stands for
    any letters, dots included, and the first pattern that fits counts."""
    base_dim: int | None = None
    """muP: the model.dim for which rates, decay and initial deviations are given; at another width they change so that
    the best rate stays where it was. None: they do not change; see docs/tuning.md."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models")."""

    rank: int | None = None
    """Rank of what is added to each target's matrix; it alone is trained. None: no adapters."""
    alpha: float = 16.0
    """What is added is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped in training."""
    targets: tuple[str, ...] = ("blocks.*",)
    """Patterns over the names of linear layers, such as blocks.*.attention.*; routers and stacked experts of a mixture
    get no adapters."""


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """What trains of a model that has learned already, and how fast; see docs/fine_tuning.md."""

    freeze: tuple[str, ...] = ()
    """Patterns over the names of parameters that stay as they are, such as token_embedding.* or blocks.0.*; a * stands
    for any letters, dots included."""
    lora: LoRAConfig = LoRAConfig()
    layer_decay: float = 1.0
    """Learning rate of a block by that of what stands above it (Howard and Ruder 2018, section 3.2, there 1 / 2.6); the
    final norm and the head have the whole rate, the embeddings the lowest."""
    optimizer_state: Literal["reset", "kept"] = "reset"
    """kept: begin with the optimizer's moments from the newest snapshot of the run that init_from names."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Factors on learning rate, weight decay and training batch size, over samples seen."""

    lr: Schedule = Schedule()
    weight_decay: Schedule = Schedule()
    batch_size: Schedule = Schedule()
    """On training.accumulation, rounded to whole batches, at least 1."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, in which units, and on what the run trains."""

    macro_batches: int
    """Length of the run, in macro-batches."""
    batches_per_macro_batch: int
    """Batches after which the model is validated, logged, snapshotted and checkpointed."""
    accumulation: int = 1
    """Batches in a step, before the schedule's factor; training batch size = batch_size x accumulation."""
    micro_batch_size: int | None = None
    """Samples in one forward pass of one device; none: the device's whole part of a batch."""
    seed: int = 1337
    """Of the initial weights, the order of samples and dropout."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = "fp32"
    """What matrices are multiplied in; weights, gradients and moments stay fp32. fp16: the loss is scaled; fp8: linear
    layers of a bf16 model, needs cleangpt[fp8]; auto: bf16 on a CUDA device that has it, else fp32."""
    compile: Literal["off", "model", "blocks"] = "off"
    """What torch.compile compiles: nothing, the whole model, or each block (compiled once for all, so faster to start);
    without a compiler on the machine, nothing."""
    recompute_every: int | None = None
    """Activation checkpointing: every so-many-th block keeps no activations and computes them again in the backward
    pass (1: all blocks do); none: all are kept."""
    loss_chunk: int | None = None
    """Tokens whose logits are held at a time, for less memory where the vocabulary is large; none: all of a
    micro-batch."""
    threads: int | None = None
    """CPU threads of PyTorch; none: PyTorch's own choice. Another number changes the last bits of results."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a loss or gradient that is not finite, before the run stops."""
    spike_threshold: float | None = None
    """Nats by which a step's loss may exceed the mean of those before it; beyond, the run goes back to a snapshot and
    leaves out samples; none: it goes on. See docs/reliability.md."""
    spike_window: int = 100
    """Steps in that mean."""
    spike_skip: int = 200
    """Batches left out then: the last ones up to the spike's, as far as the snapshot is older."""
    max_rollbacks: int = 10
    """Times that the run may go back so, before it stops."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the processes that torchrun starts; one process ignores it."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "tp"] = "auto"
    """ddp: a copy on each device; fsdp: one copy cut over all; hsdp: several copies, each cut over a group; tp: every
    matrix and the sequence cut over all; auto: ddp, or fsdp where weights, gradients and moments take more than half of
    a device's memory."""
    replicas: int = 1
    """Strategy hsdp: copies of the model."""
    tensor: int = 1
    """Strategies fsdp and hsdp: neighbouring devices over which every matrix is cut as with tp; the parts are then cut
    over the remaining devices."""
    timeout: int = 600
    """Seconds that a process waits for the others before the run ends."""
    reshard_after_forward: bool = True
    """Strategies fsdp and hsdp: free a block's gathered weights between forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Stops a run whose validation loss no longer improves."""

    patience: int | None = None
    """Macro-batches without improvement before the run stops; none: never."""
    min_delta: float = 0.0
    """Smallest fall of the validation loss that counts as improvement, in nats."""


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """Snapshots (to go on exactly) and checkpoints (weights to use)."""

    snapshot_every: int = 1
    """Macro-batches between snapshots; one is also written at a signal and at the end."""
    keep_snapshots: int = 2
    """Newest snapshots kept."""
    async_snapshots: bool = True
    """Write snapshots while training goes on; takes host memory for a copy of what each process has."""
    keep_best: int = 3
    """Checkpoints kept, by lowest validation loss."""
    checkpoint_every: int | None = None
    """Also keep a checkpoint every so many macro-batches, for good; none: only the best."""
    patience: int = 600
    """Seconds for which the last snapshot of a run is tried again where the disk is full."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What a run tells, and to whom; metrics.jsonl is always written."""

    progress: bool = True
    """Show the progress bar (plain lines where there is no terminal)."""
    wandb: Literal["disabled", "online", "offline"] = "disabled"
    """Weights & Biases; needs cleangpt[wandb]."""
    wandb_project: str = "cleangpt"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run; needs cleangpt[tensorboard]."""
    score_samples: int = 1000
    """Validation samples scored after each macro-batch, for a corpus with a task score; 0: none."""
    sample_tokens: int = 200
    """Tokens sampled from the model whenever a checkpoint is saved; 0: none."""
    sample_prompt: str | None = None
    """Where those samples begin; none: the start of the validation split."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that makes a run what it is."""

    name: str
    """Names the folder of its runs."""
    corpus: CorpusConfig
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    objective: str = "next_token"
    """What is learned: a name in OBJECTIVES."""
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    saving: SavingConfig = SavingConfig()
    tracking: TrackingConfig = TrackingConfig()
    init_from: str | None = None
    """Start from the weights of this run (its best checkpoint), of this checkpoint, or of a model of Hugging Face by
    hf:NAME or hf:FOLDER (hf:gpt2); none: from random weights."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    run_dir: str | None = None
    """Folder of the run; one that exists is gone on with. None: runs/NAME/TIME."""


def samples_per_macro_batch(experiment: Experiment) -> int:
    """Samples in a macro-batch, over all devices."""
    return experiment.training.batches_per_macro_batch * experiment.data.batch_size


def total_samples(experiment: Experiment) -> int:
    """Samples in the whole run: where a schedule's progress reaches 1."""
    return experiment.training.macro_batches * samples_per_macro_batch(experiment)


# Checking ------------------------------------------------------------------------------------------------------------

LARGEST = 2**40
AT_LEAST_ONE = f"a whole number of 1 or more, at most {LARGEST:,}"
MOST = {
    **dict.fromkeys(["model.n_layers", "model.n_experts"], 4096),
    **dict.fromkeys(["model.n_heads", "model.n_kv_heads", "model.dim", "data.prefetch", "training.threads"], 2**20),
    **dict.fromkeys(["model.hidden_dim", "model.expert_hidden_dim"], 2**24),
    **dict.fromkeys(["model.vocab_size", "model.max_seq_len", "data.seq_len"], 2**31),
}
"""Where numbers end that have a meaning, so that what is made of several of them still fits into 64 bits."""


def _up_to(most: int, value: int) -> bool:
    return 1 <= value <= most


SHARE = "from 0 to 1"
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        [
            "data.batch_size",
            "data.val_samples",
            "data.val_batch_size",
            "model.sliding_window",
            "model.global_every",
            "model.rope_original_seq_len",
            "model.experts_per_token",
            "model.ngram_rows",
            "training.macro_batches",
            "training.batches_per_macro_batch",
            "training.accumulation",
            "training.micro_batch_size",
            "training.recompute_every",
            "training.loss_chunk",
            "training.max_skipped_steps",
            "optimizer.muon.iterations",
            "optimizer.base_dim",
            "training.spike_window",
            "training.spike_skip",
            "training.max_rollbacks",
            "fine_tuning.lora.rank",
            "parallel.replicas",
            "parallel.tensor",
            "parallel.timeout",
            "early_stopping.patience",
            "saving.snapshot_every",
            "saving.keep_snapshots",
            "saving.keep_best",
            "saving.checkpoint_every",
        ],
        (lambda value: 1 <= value <= LARGEST, AT_LEAST_ONE),
    ),
    **{name: (partial(_up_to, most), f"a whole number of 1 or more, at most {most:,}") for name, most in MOST.items()},
    **dict.fromkeys(
        ["tracking.sample_tokens", "tracking.score_samples", "training.seed", "saving.patience"],
        (lambda value: 0 <= value < 2**63, "a whole number of 0 or more"),
    ),
    **dict.fromkeys(
        [f"schedule.{name}.{part}" for name in ("lr", "weight_decay", "batch_size") for part in ("warmup", "decay")],
        (lambda value: 0 <= value <= 1, SHARE),
    ),
    **dict.fromkeys(
        [
            f"schedule.{name}.{part}"
            for name in ("lr", "weight_decay", "batch_size")
            for part in ("initial", "final", "power")
        ]
        + ["optimizer.lr", "optimizer.muon.lr", "optimizer.weight_decay", "early_stopping.min_delta"],
        (lambda value: value >= 0, "0 or more"),
    ),
    **dict.fromkeys(
        ["optimizer.eps", "optimizer.clip_norm", "fine_tuning.lora.alpha", "training.spike_threshold"],
        (lambda value: value > 0, "more than 0"),
    ),
    "optimizer.betas": (lambda value: all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1"),
    **dict.fromkeys(
        [
            "model.norm_eps",
            "model.rope_theta",
            "model.rope_low_freq_factor",
            "model.rope_high_freq_factor",
            "model.logit_soft_cap",
            "model.balance_rate",
        ],
        (lambda value: 0 < value <= 1e30, "more than 0, at most 1e30"),
    ),
    "model.rope_factor": (lambda value: value >= 1, "1 or more"),
    "model.head_dim": (lambda value: 2 <= value <= 2**20 and value % 2 == 0, "an even number of 2 or more"),
    "model.n_shared_experts": (lambda value: 0 <= value <= 4096, "a whole number of 0 or more, at most 4,096"),
    "model.separator": (lambda value: value >= 0, "a whole number of 0 or more"),
    **dict.fromkeys(
        ["model.dropout", "model.ngram_dropout", "fine_tuning.lora.dropout", "optimizer.muon.momentum"],
        (lambda value: 0 <= value < 1, "from 0 to below 1"),
    ),
    "optimizer.lr_factors": (
        lambda value: all(factor >= 0 for _, factor in value), "patterns, each with a number of 0 or more"
    ),
    "fine_tuning.layer_decay": (lambda value: 0 < value <= 1, "more than 0, at most 1"),
    "training.device": (
        lambda value: re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", value) is not None,
        "auto, cpu, cuda, cuda:N or mps",
    ),
    "name": (
        lambda value: 0 < len(value) <= 100 and all(letter.isalnum() or letter in "-_." for letter in value)
        and value.strip(".") == value,
        "letters, digits, '-', '_' and '.' within",
    ),
}  # fmt: skip


def check(config: Any, path: str = "") -> None:
    """Checks type and range of every field of a dataclass, and of the dataclasses in it.

    Raises:
        UserError: one line naming the field, its value and what is allowed.
    """
    hints = get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        name, value = f"{path}{entry.name}", getattr(config, entry.name)
        if not fits(value, hints[entry.name]):
            raise UserError(f"{name} is {value!r}; allowed: {describe(hints[entry.name])}")
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
        for index, part in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(part):
                check(part, f"{name}.{index}.")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{name} is {value!r}; allowed: a finite number")
        allowed, words = RULES.get(name, (lambda _: True, ""))
        if value is not None and not allowed(value):
            raise UserError(f"{name} is {value!r}; allowed: {words}")


def check_experiment(experiment: Experiment, devices: int = 1) -> None:
    """`check`, then what one field demands of another.

    Raises:
        UserError: one line naming the fields, their values and what is allowed.
    """
    check(experiment)
    data, model, training = experiment.data, experiment.model, experiment.training
    model.check_fit()
    if data.seq_len > model.max_seq_len:
        raise UserError(
            f"data.seq_len is {data.seq_len}; allowed: at most model.max_seq_len, which is {model.max_seq_len}"
        )
    if data.batch_size % devices:
        raise UserError(f"data.batch_size is {data.batch_size}; allowed: a multiple of the {devices} devices")
    per_device = data.batch_size // devices
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
    for name in ("lr", "weight_decay", "batch_size"):
        schedule: Schedule = getattr(experiment.schedule, name)
        if schedule.shape == "wsd" and schedule.warmup + schedule.decay > 1:
            raise UserError(
                f"schedule.{name}.decay is {schedule.decay}; allowed: at most 1 - warmup, "
                f"which is {1 - schedule.warmup:g}"
            )
    if experiment.optimizer.muon.lr is not None and experiment.optimizer.lr == 0:
        raise UserError(f"optimizer.lr is {experiment.optimizer.lr}; allowed with optimizer.muon.lr: more than 0")
    if (tokens := total_samples(experiment) * data.seq_len) >= 2**63:
        raise UserError(f"the run has {tokens:,} tokens; allowed: less than 2**63")
    _check_fine_tuning(experiment)


def _check_fine_tuning(experiment: Experiment) -> None:
    """Raises UserError where the fields of `fine_tuning` do not fit one another or `init_from`."""
    tuning, source = experiment.fine_tuning, experiment.init_from
    rank = tuning.lora.rank
    if rank is not None and source is None:
        raise UserError(f"fine_tuning.lora.rank is {rank}; allowed without init_from: None, the weights being random")
    if rank is not None and experiment.optimizer.base_dim is not None:
        raise UserError(
            f"optimizer.base_dim is {experiment.optimizer.base_dim}; allowed with fine_tuning.lora.rank: None, "
            "adapters being of one rank at any width"
        )
    if rank is not None and tuning.freeze:
        raise UserError(
            f"fine_tuning.freeze is {tuning.freeze!r}; allowed with fine_tuning.lora.rank: (), adapters alone train"
        )
    if tuning.optimizer_state == "kept" and (source is None or rank is not None):
        why = "without init_from" if source is None else "with fine_tuning.lora.rank, adapters being new"
        raise UserError(f"fine_tuning.optimizer_state is 'kept'; allowed {why}: reset")


def peak(schedule: Schedule) -> float:
    """The largest factor that a schedule reaches."""
    return schedule.initial if schedule.shape == "constant" else max(schedule.initial, schedule.final)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that an annotation names; a whole number serves as a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value is argument or (value == argument and type(value) is type(argument)) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(part, arguments[0]) for part in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """An annotation in words for a message: ``a whole number or None``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return "a tuple of " + ", ".join("…" if argument is Ellipsis else describe(argument) for argument in arguments)
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


# To and from JSON ----------------------------------------------------------------------------------------------------


def to_json(config: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A dataclass as a JSON object, with a `kind` for those whose class stands in the registry `kinds`."""
    names = {cls: name for name, cls in kinds.items()}
    entries: dict[str, Any] = {"kind": names[type(config)]} if type(config) in names else {}
    return entries | {entry.name: _as_json(getattr(config, entry.name), kinds) for entry in dataclasses.fields(config)}


def _as_json(value: Any, kinds: Mapping[str, type]) -> Any:
    if isinstance(value, tuple):
        return [_as_json(part, kinds) for part in value]
    return to_json(value, kinds) if dataclasses.is_dataclass(value) else value


def from_json(cls: type[T], value: Any, kinds: Mapping[str, type], path: str = "") -> T:
    """The dataclass that `to_json` wrote; nothing in the file is executed.

    Raises:
        UserError: a field, kind or type that this version does not know.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path.strip('.') or cls.__name__} is {value!r}; allowed: an object")
    entries = dict(value)
    kind = entries.pop("kind", None)
    if kind is not None:
        if not isinstance(kind, str) or kind not in kinds or not issubclass(kinds[kind], cls):
            hint = nearest(str(kind), kinds)
            raise UserError(
                f"{path.strip('.') or cls.__name__} is of kind {kind!r}, which is not registered here{hint}; "
                "where the kind is your own, give the file that defines it with --code"
            )
        cls = kinds[kind]
    hints, known = get_type_hints(cls), {entry.name for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in entries:
        if name not in known:
            raise UserError(f"{path}{name} is not a field of {cls.__name__}{nearest(name, known)}")
    missing = {entry.name for entry in dataclasses.fields(cls)  # type: ignore[arg-type]
               if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING}  # fmt: skip
    if lacking := sorted(missing - set(entries)):
        raise UserError(f"{path}{lacking[0]} is missing; allowed: {describe(hints[lacking[0]])}")
    for name, entry in entries.items():
        entries[name] = _from_json(hints[name], entry, kinds, f"{path}{name}.")
    config = cls(**entries)
    check(config, path)
    return config


def _from_json(hint: Any, value: Any, kinds: Mapping[str, type], path: str) -> Any:
    """A field's value: lists become tuples, objects the dataclass that the annotation names."""
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value, kinds, path)
    if isinstance(value, list):
        inner = next(filter(dataclasses.is_dataclass, get_args(hint)), None)
        return tuple(_from_json(inner, part, kinds, f"{path}{index}.") for index, part in enumerate(value))
    return value
