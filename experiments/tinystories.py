"""Short stories in 4,096 byte pairs, 15.9 million parameters: made for one GPU."""

from cleangpt.config import (
    DataConfig,
    EarlyStoppingConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.tinystories import TinyStories
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="tinystories",
    corpus=TinyStories(vocab_size=4096),
    data=DataConfig(seq_len=512, batch_size=64, val_samples=1024),
    model=GPTConfig(max_seq_len=512, n_layers=8, n_heads=6, dim=384, bias=False),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(
        lr=Schedule(shape="wsd", final=0.0, warmup=0.01, decay=0.2),
        batch_size=Schedule(shape="linear", initial=0.25, final=1.0),
    ),
    training=TrainingConfig(
        macro_batches=60, batches_per_macro_batch=500, accumulation=4, micro_batch_size=32, precision="auto"
    ),
    early_stopping=EarlyStoppingConfig(patience=10),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(sample_tokens=300, sample_prompt="Once upon a time"),
)
