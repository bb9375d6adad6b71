"""Python code by byte, 0.8 million parameters, text from this machine: about a minute on two cores."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="stdlib_demo",
    corpus=Stdlib(tokenizer="byte"),
    data=DataConfig(seq_len=128, batch_size=16, val_samples=256),
    model=GPTConfig(max_seq_len=128, n_layers=4, n_heads=4, dim=128, bias=False),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="wsd", final=0.0, warmup=0.05, decay=0.4)),
    training=TrainingConfig(macro_batches=6, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(sample_tokens=300, sample_prompt="def "),
)
