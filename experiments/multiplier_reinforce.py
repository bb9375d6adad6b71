"""`multiplier_grpo` with REINFORCE, the textbook's form: the mean of a round as baseline, one update per round."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.environments.config import RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives.reinforce import Reinforce

corpus = Multiplier(
    digits=2, operator_sign=True, equals_sign=True, train_samples=8_500, val_samples=1_000, test_samples=500
)

experiment = Experiment(
    name="multiplier_reinforce",
    init_from="multiplier_base",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=1024),
    model=GPTConfig(n_layers=3, n_heads=4, dim=128),
    objective=Reinforce(),
    rollouts=RolloutConfig(prompts=1024, completions=1),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=12, batches_per_macro_batch=10),
    saving=SavingConfig(keep_best=1, best="highest exact_match"),
    tracking=TrackingConfig(score_samples=500),
)
