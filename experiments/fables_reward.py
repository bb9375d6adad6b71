"""A reward model of the openings of fables: `cleangpt train fables_sft` comes first; see docs/post_training.md."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives.reward_model import RewardModel

corpus = FablePreferences(train_pairs=2000, val_pairs=1000)

experiment = Experiment(
    name="fables_reward",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=128),
    model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=4, dim=96),
    objective=RewardModel(centring=0.01),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.0, warmup=0.1)),
    training=TrainingConfig(macro_batches=8, batches_per_macro_batch=16),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(score_samples=0, sample_tokens=0),
    init_from="fables_sft",
)
