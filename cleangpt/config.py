"""Every hyperparameter of an experiment, as plain dataclasses.

An experiment is a Python file that builds one `Experiment` and calls it `experiment`. Units stand with each field; a
*share of the run* is a number from 0 to 1. What a field may be is checked twice: its type and range here (`check`),
its fit with the other fields in `check_experiment`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from cleangpt.errors import UserError

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
    """Where datasets are kept."""


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


def peak(schedule: Schedule) -> float:
    """The largest factor that a schedule reaches."""
    return schedule.initial if schedule.shape == "constant" else max(schedule.initial, schedule.final)
