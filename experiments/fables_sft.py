"""First sentences of fables, 276 thousand parameters; what fables_dpo and fables_reward start from."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

corpus = FableOpenings()

experiment = Experiment(
    name="fables_sft",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64),
    model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=4, dim=96),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=5, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(score_samples=500, sample_tokens=16),
)
