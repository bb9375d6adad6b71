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
from cleangpt.objectives import NextToken, Objective
from cleangpt.validation import Checked, Pattern

Name = Annotated[str, Pattern(r"(?!\.)[\w.-]{1,100}(?<!\.)", "letters, digits, '-', '_' and '.' within")]


@dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
    """Everything that determines a run."""

    name: Name
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
    """Start from the weights of this run (its best checkpoint) or checkpoint, or of a Hugging Face model as hf:NAME or
    hf:FOLDER (hf:gpt2); None: from random weights."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    run_dir: str | None = None
    """Folder of the run; an existing run is resumed. None: runs/NAME/TIME."""


def samples_per_macro_batch(experiment: Experiment) -> int:
    """Samples in a macro-batch, over all devices."""
    return experiment.training.batches_per_macro_batch * experiment.data.batch_size


def total_samples(experiment: Experiment) -> int:
    """Samples in the whole run, whose length has been resolved: where a schedule's progress reaches 1."""
    return experiment.training.num_macro_batches * samples_per_macro_batch(experiment)
