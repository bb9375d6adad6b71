"""Shakespeare by character, 10.7 million parameters, as nanoGPT trains it on one GPU: its validation loss is 1.47."""

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
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="shakespeare_char",
    corpus=ShakespeareChar(),
    data=DataConfig(seq_len=256, batch_size=64),
    model=GPTConfig(max_seq_len=256, n_layers=6, n_heads=6, dim=384, bias=False, dropout=0.2),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.1, warmup=0.02)),
    training=TrainingConfig(macro_batches=20, batches_per_macro_batch=250, precision="auto"),
    early_stopping=EarlyStoppingConfig(patience=8),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(sample_tokens=500),
)
