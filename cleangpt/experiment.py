"""An experiment: everything that determines a run."""

from dataclasses import dataclass
from typing import Annotated

from cleangpt.config import (
    CorpusConfig,
    DataConfig,
    EarlyStoppingConfig,
    FineTuningConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SavingConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.environments.config import RolloutConfig
from cleangpt.objectives import NextToken, Objective
from cleangpt.validation import Checked, Folder, Metavar, Pattern, RunOrModel

Name = Annotated[
    str, Pattern(r"(?!\.)[\w.-]{1,100}(?<!\.)", "letters, digits, '-', '_' and '.' within"), Metavar("NAME")
]


@dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
    """Everything that determines a run."""

    name: Name
    """Name of the experiment; its runs are in runs/NAME."""
    corpus: CorpusConfig
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    objective: Objective = NextToken()
    """The loss to minimize."""
    rollouts: RolloutConfig = RolloutConfig()
    """How a policy's answers are sampled and rewarded; for objectives such as GRPO, ignored by others."""
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    saving: SavingConfig = SavingConfig()
    tracking: TrackingConfig = TrackingConfig()
    init_from: RunOrModel | None = None
    """Initial weights: a run (its best checkpoint), a checkpoint, or a Hugging Face model as hf:NAME or hf:FOLDER, such
    as hf:gpt2; None: random."""
    encoder_from: Annotated[str, Metavar("RUN")] | None = None
    """Likewise of the encoder of images; also a CLIP or SigLIP; None: init_from."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    run_dir: Folder | None = None
    """Folder of the run; an existing run is resumed; None: runs/NAME/TIME."""


def samples_per_macro_batch(experiment: Experiment) -> int:
    """Samples in a macro-batch, over all devices."""
    return experiment.training.batches_per_macro_batch * experiment.data.batch_size


def total_samples(experiment: Experiment) -> int:
    """Samples in the whole run, whose length has been resolved; progress is samples seen divided by this."""
    return experiment.training.num_macro_batches * samples_per_macro_batch(experiment)
