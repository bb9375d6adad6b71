"""Three-digit addition from right and wrong alone: GRPO on `adder_base`, with DAPO's loss and dynamic sampling."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.adder import Adder
from cleangpt.environments.config import RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives.grpo import GRPO

corpus = Adder(digits=3, operator_sign=True, equals_sign=True)

experiment = Experiment(
    name="adder_grpo",
    init_from="adder_base",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=256),
    model=GPTConfig(n_layers=2, n_heads=4, dim=96),
    objective=GRPO(norm="token", clip_low=0.2, clip_high=0.28),
    rollouts=RolloutConfig(prompts=128, completions=8, dynamic_sampling=True),
    optimizer=OptimizerConfig(lr=7e-4, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=15, batches_per_macro_batch=40),
    saving=SavingConfig(keep_best=1, best="highest exact_match"),
    tracking=TrackingConfig(score_samples=1000),
)
