"""Every hyperparameter of an experiment, as plain dataclasses.

An experiment is a Python file that builds one `Experiment` and calls it `experiment`. Every field names its unit; a
*share of the run* is a number from 0 to 1. Each dataclass checks its own fields against their annotations; one
function, `training/launch.py: check`, checks that the parts of an experiment fit together.
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
    Device,
    Folder,
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked, section="model"):
    """Base class of all model configurations; the architectures are in `models/`."""

    vocab_size: Tokens | None = None
    """Vocabulary size; None: the tokenizer's. A larger one pads the embedding."""
    max_seq_len: Tokens | None = None
    """Maximum context length in tokens; None: data.seq_len."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fit()

    def check_fit(self) -> None:
        """Checks that the fields fit together: `n_heads`, where there is one, divides `dim`.

        Raises:
            UserError: one line naming the field, its value and what is allowed.
        """
        heads, dim = getattr(self, "n_heads", 1), getattr(self, "dim", 1)
        if dim % heads:
            raise UserError(f"model.n_heads is {heads}; allowed: a divisor of model.dim, which is {dim}")

    def resolved(self: M, vocab_size: int, seq_len: int) -> M:
        """The same model, with the fields filled in that depend on the tokenizer and the data."""
        vocab_size, max_seq_len = self.vocab_size or vocab_size, self.max_seq_len or seq_len
        return dataclasses.replace(self, vocab_size=vocab_size, max_seq_len=max_seq_len)

    def at_width(self: M, dim: int) -> M:
        """The same model at another width: all widths and the number of heads scale in proportion.

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
    """Base class of all corpus configurations; the corpora are in `corpora/`."""


@dataclass(frozen=True, kw_only=True)
class Source(Checked, section="corpus.sources"):
    """One corpus of a mixture; see `corpora/mixture.py`."""

    name: str
    """Name of the source, used in its metrics: val_loss/NAME."""
    corpus: CorpusConfig
    weight: float | tuple[tuple[float, float], ...] = 1.0
    """Sampling weight relative to the other sources: a number, or points (progress, weight) to interpolate linearly,
    where progress is a share of the run."""
    max_epochs: int | None = None
    """Epochs after which the source is exhausted; None: it repeats for the whole run."""


Shape = Literal["constant", "linear", "cosine", "power", "wsd"]


@dataclass(frozen=True, kw_only=True)
class Schedule(Checked, section="schedule"):
    """A factor on a base value as a function of the run's progress; see `training/schedules.py`."""

    shape: Shape = "constant"
    """Curve from initial to final after warm-up."""
    initial: NonNegative = 1.0
    """Factor at the end of warm-up."""
    final: NonNegative = 1.0
    """Factor at the end of the run; ignored by shape constant."""
    warmup: Share = 0.0
    """Share of the run with linear warm-up from near 0 to initial."""
    decay: Share = 0.2
    """Shape wsd: share of the run, at its end, with linear decay from initial to final."""
    power: NonNegative = 2.0
    """Shape power: exponent of the decay; 1 is linear."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, section="data"):
    """Samples, batches and how they are loaded."""

    seq_len: Tokens
    """Tokens per sample."""
    batch_size: Count
    """Samples per batch, over all devices."""
    val_samples: Count | None = None
    """Validation samples per evaluation, always the same (for a mixture: per source); None: the whole split."""
    val_batch_size: Count | None = None
    """Samples per forward pass and device in validation; None: micro_batch_size. A larger value is faster for small
    models, and takes less memory than the same size in training."""
    prefetch: Width = 4
    """Batches to load in advance, in the background."""
    folder: Folder = "data"
    """Folder of the prepared datasets."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig(Checked, section="optimizer.muon"):
    """Muon (Jordan et al. 2024) for the matrices in the model's blocks; AdamW updates the rest."""

    lr: NonNegative | None = None
    """Peak learning rate of Muon, before the schedule's factor; updates have the same RMS as AdamW's at the same rate.
    None: AdamW updates all parameters."""
    momentum: ShareBelowOne = 0.95
    """Momentum coefficient."""
    iterations: Count = 5
    """Newton-Schulz iterations to orthogonalize an update; fewer are faster and less exact."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, section="optimizer"):
    """AdamW (Loshchilov and Hutter 2019), with Muon for some parameters; biases and gains have no weight decay."""

    lr: NonNegative
    """Peak learning rate, before the schedule's factor."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, before the schedule's factor."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW's beta1 and beta2: decay rates of the first and second moment of the gradient."""
    eps: Positive = 1e-8
    """AdamW's epsilon, added to the denominator of the update."""
    clip_norm: Positive | None = 1.0
    """Maximum global gradient norm; None: no clipping."""
    muon: MuonConfig = MuonConfig()
    lr_factors: tuple[tuple[str, NonNegative], ...] = ()
    """Learning-rate factors by parameter-name pattern, such as ("head.*", 2.0); * matches any characters, dots
    included; the first matching pattern applies."""
    base_dim: Count | None = None
    """muP: base width, the model.dim at which learning rates, weight decay and initialization were tuned; at another
    width they are rescaled, so that the best learning rate stays the same. None: no muP; see docs/tuning.md."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Checked, section="fine_tuning.lora"):
    """Low-rank adapters (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models")."""

    rank: Count | None = None
    """Rank of the adapters; all other weights are frozen. None: no LoRA."""
    alpha: Positive = 16.0
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability of the adapters' inputs in training."""
    targets: tuple[str, ...] = ()
    """Name patterns of the linear layers that get adapters, such as blocks.*.attention.*; empty: all in the model's
    blocks. Routers and stacked experts never do."""


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(Checked, section="fine_tuning"):
    """Fine-tuning: frozen parameters, LoRA, layer-wise learning rates; see docs/fine_tuning.md."""

    freeze: tuple[str, ...] = ()
    """Name patterns of parameters to freeze, such as token_embedding.* or blocks.0.*; * matches any characters, dots
    included."""
    lora: LoRAConfig = LoRAConfig()
    layer_decay: Annotated[float, Bounds(above=0, most=1)] = 1.0
    """Layer-wise learning-rate decay: the factor from each block to the one below it (Howard and Ruder 2018, section
    3.2, use 1 / 2.6); the final norm and the head get the full rate, the embeddings the lowest."""
    optimizer_state: Literal["reset", "kept"] = "reset"
    """reset: start with fresh optimizer moments; kept: load them from the newest snapshot of the run in init_from."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Checked, section="schedule"):
    """Schedules of learning rate, weight decay and training batch size, as functions of the samples seen."""

    lr: Schedule = Schedule()
    weight_decay: Schedule = Schedule()
    batch_size: Schedule = Schedule()
    """Schedule of the training batch size: multiplies training.accumulation, rounded to at least 1 batch."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked, section="training"):
    """Length of the run, batch sizes, device and precision, memory savings, recovery from spikes."""

    macro_batches: Count | None = None
    """Length of the run in macro-batches. Set exactly one of macro_batches, steps, tokens and epochs; lengths in the
    other units are rounded up to full macro-batches when the run starts."""
    steps: Count | None = None
    """Length of the run in optimizer steps."""
    tokens: Annotated[int, Bounds(1, 2**63 - 1)] | None = None
    """Length of the run in training tokens."""
    epochs: Positive | None = None
    """Length of the run in epochs; not for a mixture, whose sources differ in size."""
    batches_per_macro_batch: Count
    """Batches per macro-batch, after which the run validates, logs and saves."""
    accumulation: Count = 1
    """Gradient accumulation: batches per optimizer step, before the schedule's factor; the training batch size is
    data.batch_size x accumulation."""
    micro_batch_size: Count | None = None
    """Samples per forward pass and device; None: the device's full share of a batch."""
    seed: CountOrZero = 1337
    """Random seed of the initial weights, the order of samples and dropout."""
    device: Device = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = "auto"
    """Precision of matrix products; weights, gradients and moments stay in fp32. auto: bf16 on a CUDA device that
    supports it, else fp32; fp16: with loss scaling; fp8: bf16 with linear layers in fp8, needs the package torchao."""
    compile: Literal["off", "model", "blocks"] = "off"
    """torch.compile: off, the entire model, or one block whose code all blocks share, which starts faster. Ignored
    where the machine has no compiler."""
    recompute_every: Count | None = None
    """Activation checkpointing of every n-th block, which recomputes its activations in the backward pass; 1: all
    blocks; None: off."""
    recompute: Literal["full", "selective"] = "full"
    """What such a block recomputes: everything from its input, or everything but matrix products and attention."""
    loss_chunk: Count | None = None
    """Compute the loss in chunks of this many tokens, to save the memory of their logits with a large vocabulary;
    None: all tokens of a micro-batch at once."""
    threads: Width | None = None
    """CPU threads; None: PyTorch's default. A different number changes the last bits of results."""
    max_skipped_steps: Count = 10
    """Consecutive steps skipped for a non-finite loss or gradient before the run stops."""
    spike_threshold: Positive | None = None
    """Roll back when a step's loss exceeds the running mean by this many nats: return to a snapshot and skip the
    samples that led to the spike; None: off. See docs/reliability.md."""
    spike_window: Count = 100
    """Steps in the running mean of the loss."""
    spike_skip: Count = 200
    """Batches to skip after a rollback: the last ones before the spike, at most back to the snapshot."""
    max_rollbacks: Count = 10
    """Rollbacks before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            found = " and ".join(f"training.{name} {value}" for name, value in given.items()) or "none of them"
            raise UserError(f"the run's length is {found}; allowed: one of training.{', training.'.join(LENGTHS)}")
        if self.recompute == "selective" and self.recompute_every is None:
            raise UserError("training.recompute is 'selective'; allowed without training.recompute_every: full")

    @property
    def num_macro_batches(self) -> int:
        """Length of a resolved run, in macro-batches."""
        assert self.macro_batches is not None, "resolve() has filled it in"
        return self.macro_batches


LENGTHS = ("macro_batches", "steps", "tokens", "epochs")
"""The fields of `TrainingConfig` for the length of the run, of which exactly one is set."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Checked, section="parallel"):
    """Parallelism over the processes that torchrun starts; ignored by a single process."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "tp"] = "auto"
    """ddp: a full replica on each device; fsdp: weights, gradients and moments sharded over all devices; hsdp: fsdp
    within groups, replicated across them; tp: tensor and sequence parallelism over all devices; auto: ddp, or fsdp if
    weights, gradients and moments take more than half of a device's memory."""
    replicas: Count = 1
    """hsdp: number of replicas."""
    tensor: Count = 1
    """fsdp and hsdp: degree of tensor parallelism, over neighbouring devices."""
    timeout: Count = 600
    """Seconds that a collective waits for other processes before the run fails."""
    reshard_after_forward: bool = True
    """fsdp and hsdp: free a block's gathered weights between forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Checked, section="early_stopping"):
    """Stops a run whose validation loss, or other `saving.best`, no longer improves."""

    patience: Count | None = None
    """Macro-batches without improvement before the run stops; None: no early stopping."""
    min_delta: NonNegative = 0.0
    """Minimum change that counts as an improvement, in the metric's unit: nats, for the validation loss."""
    target: float | None = None
    """Stop as soon as the metric is at least as good as this; None: no target."""


@dataclass(frozen=True, kw_only=True)
class SavingConfig(Checked, section="saving"):
    """Snapshots (to resume exactly) and checkpoints (weights to use)."""

    snapshot_every: Count = 1
    """Macro-batches between snapshots; one is also saved on a signal and at the end."""
    keep_snapshots: Count = 2
    """Number of snapshots to keep, the newest."""
    async_snapshots: bool = True
    """Write snapshots in the background; needs host memory for a copy of each process's state."""
    keep_best: Count = 3
    """Number of checkpoints to keep, the best ones."""
    best: Annotated[str, Pattern(r"(lowest|highest) [\w./-]+", "lowest or highest, and a metric")] = "lowest val_loss"
    """Which are best, as in "highest exact_match", by a metric of metrics.jsonl; early stopping goes by it too."""
    checkpoint_every: Count | None = None
    """Also save a permanent checkpoint every n macro-batches; None: only the best."""
    patience: CountOrZero = 600
    """Seconds to retry saving the last snapshot of a run when the disk is full."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked, section="tracking"):
    """Where a run's metrics are logged; metrics.jsonl and steps.jsonl are always written."""

    progress: bool = True
    """Show a progress bar (plain lines without a terminal)."""
    wandb: Literal["disabled", "online", "offline"] = "disabled"
    """Weights & Biases; needs the package wandb."""
    wandb_project: str = "cleangpt"
    """Project in Weights & Biases."""
    every: Count | None = None
    """Steps between rows of steps.jsonl; None: about 1,000 rows over the whole run."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run folder; needs the package tensorboard."""
    score_samples: CountOrZero = 1000
    """Validation tasks scored after each macro-batch, for a corpus with an environment; 0: none."""
    sample_tokens: CountOrZero = 200
    """Length in tokens of the text sampled from the model whenever a checkpoint is saved; 0: no text."""
    sample_prompt: str | None = None
    """Prompt of that text; None: the start of the validation split."""


def peak(schedule: Schedule) -> float:
    """The largest factor that a schedule reaches."""
    return schedule.initial if schedule.shape == "constant" else max(schedule.initial, schedule.final)
