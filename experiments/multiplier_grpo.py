"""Two-digit multiplication from right and wrong alone: GRPO on `multiplier_base`, as `adder_grpo`."""

from cleangpt.config import (
    DataConfig,
    MuonConfig,
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
from cleangpt.objectives.grpo import GRPO

corpus = Multiplier(
    digits=2, operator_sign=True, equals_sign=True, train_samples=8_500, val_samples=1_000, test_samples=500
)

experiment = Experiment(
    name="multiplier_grpo",
    init_from="multiplier_base",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=256),
    model=GPTConfig(n_layers=3, n_heads=4, dim=128),
    objective=GRPO(norm="token", clip_low=0.2, clip_high=0.28, entropy_coef=0.01),
    rollouts=RolloutConfig(prompts=256, completions=4, dynamic_sampling=True, max_draws=8),
    optimizer=OptimizerConfig(
        lr=5e-4, weight_decay=1.0, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=5e-4, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=110, batches_per_macro_batch=40),
    saving=SavingConfig(keep_best=1, best="highest exact_match"),
    tracking=TrackingConfig(score_samples=1_000, every=1),
)
