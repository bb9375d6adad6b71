"""`multiplier`, stopped as soon as its most likely answers are 47 % right: where `multiplier_grpo` starts."""

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
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

corpus = Multiplier(
    digits=2, operator_sign=True, equals_sign=True, train_samples=8_500, val_samples=1_000, test_samples=500
)

experiment = Experiment(
    name="multiplier_base",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=256),
    model=GPTConfig(n_layers=3, n_heads=4, dim=128, dropout=0.1),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.5, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=200, batches_per_macro_batch=20),
    early_stopping=EarlyStoppingConfig(target=0.47),
    saving=SavingConfig(keep_best=1, best="highest exact_match", snapshot_every=100),
    tracking=TrackingConfig(score_samples=1_000, sample_tokens=8),
)
