"""Python code in 4,096 byte pairs, 12.3 million parameters: made for one GPU."""

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
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="stdlib_code",
    corpus=Stdlib(tokenizer="bpe", vocab_size=4096),
    data=DataConfig(seq_len=256, batch_size=32),
    model=GPTConfig(max_seq_len=256, n_layers=6, n_heads=6, dim=384, bias=False, dropout=0.1),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(
        lr=Schedule(shape="wsd", final=0.0, warmup=0.02, decay=0.3),
        batch_size=Schedule(shape="linear", initial=0.25, final=1.0),
    ),
    training=TrainingConfig(macro_batches=40, batches_per_macro_batch=200, accumulation=4, precision="auto"),
    early_stopping=EarlyStoppingConfig(patience=10),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(sample_tokens=300, sample_prompt="def "),
)
