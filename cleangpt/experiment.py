"""An experiment: everything that makes a run what it is."""

from dataclasses import dataclass

from cleangpt.config import (
    CorpusConfig,
    DataConfig,
    EarlyStoppingConfig,
    FineTuningConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
    peak,
)
from cleangpt.errors import UserError
from cleangpt.objectives import NextToken, Objective
from cleangpt.validation import check


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that makes a run what it is."""

    name: str
    """Names the folder of its runs."""
    corpus: CorpusConfig
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    objective: Objective = NextToken()
    """What is learned."""
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
