"""Every hyperparameter of an experiment, as plain dataclasses.

An experiment is a Python file that builds one `Experiment` and calls it `experiment`. Units stand with each field; a
*share of the run* is a number from 0 to 1. Each dataclass checks its own fields against their annotations; what the
parts of an experiment demand of one another is checked in one function, `training/launch.py: check`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from cleangpt.errors import UserError
from cleangpt.validation import (
    Bounds,
    Checked,
    Count,
    CountOrZero,
    NonNegative,
    Pattern,
    Positive,
    Share,
    ShareBelowOne,
)

M = TypeVar("M", bound="ModelConfig")
Tokens = Annotated[int, Bounds(1, 2**31)]
Width = Annotated[int, Bounds(1, 2**20)]
Layers = Annotated[int, Bounds(1, 4096)]
Device = Annotated[str, Pattern(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", "auto, cpu, cuda, cuda:N or mps")]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked, section="model"):
    """What the configuration of every architecture has; the architectures are in `models/`."""

    vocab_size: Tokens | None = None
    """Vocabulary size; None: the tokenizer's. A larger one pads the embedding."""
    max_seq_len: Tokens | None = None
    """Longest sequence that the model can read, in tokens; None: data.seq_len."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fit()

    def check_fit(self) -> None:
        """Checks the fields against one another: where there are `n_heads` and `dim`, one divides the other.

        Raises:
            UserError: one line naming the field, its value and what is allowed.
        """
        heads, dim = getattr(self, "n_heads", 1), getattr(self, "dim", 1)
        if dim % heads:
            raise UserError(f"model.n_heads is {heads}; allowed: a divisor of model.dim, which is {dim}")

    def resolved(self: M, vocab_size: int, seq_len: int) -> M:
        """The same model with the fields filled in that are left to the tokenizer and the data."""
        vocab_size, max_seq_len = self.vocab_size or vocab_size, self.max_seq_len or seq_len
        return dataclasses.replace(self, vocab_size=vocab_size, max_seq_len=max_seq_len)

    def at_width(self: M, dim: int) -> M:
        """The same model at another width: all widths scale in proportion, and with them the number of heads.

        Raises:
            UserError: the model has no `dim`, or a width or the number of heads would not be a whole number.
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
class CorpusConfig(Checked, section="corpus"):
    """What the configuration of every corpus has; the corpora are in `corpora/`."""


@dataclass(frozen=True, kw_only=True)
class Source(Checked, section="corpus.sources"):
    """One corpus of a mixture; see `corpora/mixture.py`."""

    name: str
    """Names its metrics, as in val_loss/NAME."""
    corpus: CorpusConfig
    weight: float | tuple[tuple[float, float], ...] = 1.0
    """Its share of the samples relative to the weights of the other sources: a number, or points (progress, weight)
    joined by straight lines, progress being a share of the run."""
    max_epochs: int | None = None
    """Passes over its training samples after which the source is exhausted; None: it repeats for the whole run."""


Shape = Literal["constant", "linear", "cosine", "power", "wsd"]


@dataclass(frozen=True, kw_only=True)
class Schedule(Checked, section="schedule"):
    """A factor over the run's progress that multiplies a base value; see `training/schedules.py`."""

    shape: Shape = "constant"
    """How the factor goes from initial to final after warm-up."""
    initial: NonNegative = 1.0
    """Factor at the end of warm-up."""
    final: NonNegative = 1.0
    """Factor at the end of the run; ignored by shape constant."""
    warmup: Share = 0.0
    """Share of the run over which the factor rises linearly from near 0 to initial."""
    decay: Share = 0.2
    """Shape wsd: share of the run, at its end, over which the factor falls from initial to final."""
    power: NonNegative = 2.0
    """Shape power: the exponent; 1 is linear."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, section="data"):
    """What one sample and one batch are."""

    seq_len: Tokens
    """Tokens per sample."""
    batch_size: Count
    """Samples per batch, over all devices."""
    val_samples: Count | None = None
    """Validation samples per evaluation (of each source of a mixture), always the same ones; None: the whole split."""
    val_batch_size: Count | None = None
    """Samples per forward pass and device in validation; None: micro_batch_size. Larger is faster for small models,
    and takes less memory than the same size in training."""
    prefetch: Width = 4
    """Batches loaded ahead of the one in use."""
    folder: str = "data"
    """Folder of the prepared datasets."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig(Checked, section="optimizer.muon"):
    """Muon (Jordan et al. 2024) for the matrices in the model's blocks; AdamW updates the rest."""

    lr: NonNegative | None = None
    """Learning rate of these matrices, before the schedule's factor; their updates have the RMS of AdamW's at the same
    rate. None: AdamW updates them too."""
    momentum: ShareBelowOne = 0.95
    """Decay rate of the momentum."""
    iterations: Count = 5
    """Newton-Schulz iterations that orthogonalise an update; fewer are faster and less exact."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, section="optimizer"):
    """AdamW (Loshchilov and Hutter 2019), with Muon for some parameters; biases and gains have no weight decay."""

    lr: NonNegative
    """Peak learning rate, before the schedule's factor."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, before the schedule's factor."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay rates of the first and second moment of the gradient."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    clip_norm: Positive | None = 1.0
    """Gradients are clipped to this global norm; None: no clipping."""
    muon: MuonConfig = MuonConfig()
    lr_factors: tuple[tuple[str, NonNegative], ...] = ()
    """Factors on the learning rates of parameters by a pattern of their names, such as ("head.*", 2.0); a * matches any
    characters, dots included, and the first matching pattern counts."""
    base_dim: Count | None = None
    """muP: the model.dim for which learning rates, weight decay and initial values are given; at another width they are
    rescaled so that the best learning rate stays the same. None: no rescaling; see docs/tuning.md."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Checked, section="fine_tuning.lora"):
    """Low-rank adapters (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models")."""

    rank: Count | None = None
    """Rank of the adapters, which alone are trained; None: no adapters."""
    alpha: Positive = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability of an adapter's inputs in training."""
    targets: tuple[str, ...] = ("blocks.*",)
    """Patterns over the names of linear layers, such as blocks.*.attention.*; routers and stacked experts get no
    adapters."""


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(Checked, section="fine_tuning"):
    """Fine-tuning: frozen parameters, LoRA, layer-wise learning rates; see docs/fine_tuning.md."""

    freeze: tuple[str, ...] = ()
    """Patterns over the names of parameters that are frozen, such as token_embedding.* or blocks.0.*; a * matches any
    characters, dots included."""
    lora: LoRAConfig = LoRAConfig()
    layer_decay: Annotated[float, Bounds(above=0, most=1)] = 1.0
    """Factor on the learning rate from one block to the block below it (Howard and Ruder 2018, section 3.2, there
    1 / 2.6); the final norm and the head have the full rate, the embeddings the lowest."""
    optimizer_state: Literal["reset", "kept"] = "reset"
    """kept: start with the optimizer's moments from the newest snapshot of the run that init_from names."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Checked, section="schedule"):
    """Schedules of learning rate, weight decay and training batch size, over the samples seen."""

    lr: Schedule = Schedule()
    weight_decay: Schedule = Schedule()
    batch_size: Schedule = Schedule()
    """Multiplies training.accumulation; rounded to whole batches, at least 1."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked, section="training"):
    """How long, in which units, and on what the run trains."""

    macro_batches: Count | None = None
    """Length of the run in macro-batches. Exactly one of macro_batches, steps, tokens and epochs is given; the others
    are rounded up to whole macro-batches when the run starts."""
    steps: Count | None = None
    """Length of the run in optimizer steps."""
    tokens: Annotated[int, Bounds(1, 2**63 - 1)] | None = None
    """Length of the run in training tokens."""
    epochs: Positive | None = None
    """Length of the run in passes over the training split; not for a mixture, whose sources differ in length."""
    batches_per_macro_batch: Count
    """Batches between two evaluations: after each macro-batch the run validates, logs, and saves."""
    accumulation: Count = 1
    """Batches per optimizer step, before the schedule's factor; training batch size = batch_size x accumulation."""
    micro_batch_size: Count | None = None
    """Samples per forward pass and device; None: the device's whole part of a batch."""
    seed: CountOrZero = 1337
    """Random seed of the initial weights, the order of samples and dropout."""
    device: Device = "auto"
    """auto (cuda, else mps, else cpu), or cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = "auto"
    """Precision of matrix products; weights, gradients and moments stay fp32. auto: bf16 on a CUDA device that has it,
    else fp32; fp16: with loss scaling; fp8: linear layers of a bf16 model, needs cleangpt[fp8]."""
    compile: Literal["off", "model", "blocks"] = "off"
    """What torch.compile compiles: nothing, the whole model, or each block (compiled once for all of them, so it starts
    faster); nothing where the machine has no compiler."""
    recompute_every: Count | None = None
    """Activation checkpointing: every n-th block recomputes its activations in the backward pass (1: all blocks);
    None: off."""
    loss_chunk: Count | None = None
    """Tokens whose logits are held in memory at a time, which saves memory with a large vocabulary; None: all of a
    micro-batch."""
    threads: Width | None = None
    """CPU threads of PyTorch; None: PyTorch's default. Another number changes the last bits of results."""
    max_skipped_steps: Count = 10
    """Consecutive steps with a non-finite loss or gradient, which are skipped, before the run stops."""
    spike_threshold: Positive | None = None
    """Nats by which a step's loss may exceed the running mean; beyond, the run rolls back to a snapshot and skips the
    samples that led there; None: no rollback. See docs/reliability.md."""
    spike_window: Count = 100
    """Steps in the running mean."""
    spike_skip: Count = 200
    """Batches skipped after a rollback: the last ones up to the spike, as far as the snapshot is older."""
    max_rollbacks: Count = 10
    """Rollbacks before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            found = " and ".join(f"training.{name} {value}" for name, value in given.items()) or "none of them"
            raise UserError(f"the run's length is {found}; allowed: one of training.{', training.'.join(LENGTHS)}")

    @property
    def num_macro_batches(self) -> int:
        """Length of a resolved run, in macro-batches."""
        assert self.macro_batches is not None, "resolve() has filled it in"
        return self.macro_batches


LENGTHS = ("macro_batches", "steps", "tokens", "epochs")
"""The fields of `TrainingConfig` of which one gives the length of the run."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Checked, section="parallel"):
    """How the model is distributed over the processes that torchrun starts; ignored by a single process."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "tp"] = "auto"
    """ddp: a replica on each device; fsdp: one copy sharded over all; hsdp: several replicas, each sharded over a
    group; tp: every matrix and the sequence sharded over all (tensor parallelism); auto: ddp, or fsdp where weights,
    gradients and moments take more than half of a device's memory."""
    replicas: Count = 1
    """Strategy hsdp: number of replicas."""
    tensor: Count = 1
    """Strategies fsdp and hsdp: neighbouring devices over which every matrix is sharded as with tp, within the
    sharding over the remaining devices."""
    timeout: Count = 600
    """Seconds that a process waits for the others before the run ends."""
    reshard_after_forward: bool = True
    """Strategies fsdp and hsdp: free a block's gathered weights between forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Checked, section="early_stopping"):
    """Stops a run whose validation loss no longer improves."""

    patience: Count | None = None
    """Macro-batches without improvement before the run stops; None: never."""
    min_delta: NonNegative = 0.0
    """Smallest decrease of the validation loss that counts as an improvement, in nats."""


@dataclass(frozen=True, kw_only=True)
class SavingConfig(Checked, section="saving"):
    """Snapshots (to resume exactly) and checkpoints (weights to use)."""

    snapshot_every: Count = 1
    """Macro-batches between snapshots; one is also written at a signal and at the end."""
    keep_snapshots: Count = 2
    """Newest snapshots kept."""
    async_snapshots: bool = True
    """Write snapshots in the background; takes host memory for a copy of each process's state."""
    keep_best: Count = 3
    """Checkpoints kept, by lowest validation loss."""
    checkpoint_every: Count | None = None
    """Also keep a checkpoint every n macro-batches, permanently; None: only the best."""
    patience: CountOrZero = 600
    """Seconds for which the last snapshot of a run is retried while the disk is full."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked, section="tracking"):
    """Where a run's metrics go; metrics.jsonl is always written."""

    progress: bool = True
    """Show a progress bar (plain lines without a terminal)."""
    wandb: Literal["disabled", "online", "offline"] = "disabled"
    """Weights & Biases; needs cleangpt[wandb]."""
    wandb_project: str = "cleangpt"
    """Project in Weights & Biases."""
    every: int | None = None
    """Steps between two points of steps.jsonl; None: about 1,000 points in the whole run."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run; needs cleangpt[tensorboard]."""
    score_samples: CountOrZero = 1000
    """Validation samples scored after each macro-batch, for a corpus with a task score; 0: none."""
    sample_tokens: CountOrZero = 200
    """Tokens sampled from the model whenever a checkpoint is saved; 0: none."""
    sample_prompt: str | None = None
    """Prompt of those samples; None: the start of the validation split."""


def peak(schedule: Schedule) -> float:
    """The largest factor that a schedule reaches."""
    return schedule.initial if schedule.shape == "constant" else max(schedule.initial, schedule.final)
