"""Openings of fables with more bright words, by preferences: `cleangpt train fables_sft` comes first.

It starts from the newest run of that name, which is also its reference; see docs/post_training.md.
"""

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
from cleangpt.objectives.dpo import DPO

corpus = FablePreferences(train_pairs=8192, val_pairs=500)

experiment = Experiment(
    name="fables_dpo",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=128),
    model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=4, dim=96),
    objective=DPO(beta=0.8, sft_weight=0.25),
    optimizer=OptimizerConfig(lr=6e-4, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.0, warmup=0.1)),
    training=TrainingConfig(macro_batches=8, batches_per_macro_batch=16),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(score_samples=500, sample_tokens=16),
    init_from="fables_sft",
)
