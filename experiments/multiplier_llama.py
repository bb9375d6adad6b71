"""Two-digit multiplication with a Llama of 0.6 million parameters, to compare with `multiplier`."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

corpus = Multiplier(digits=2, operator_sign=True, equals_sign=True)

experiment = Experiment(
    name="multiplier_llama",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=256),
    model=LlamaConfig(n_layers=3, n_heads=4, dim=128, hidden_dim=344, rope_theta=10_000.0),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.5, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=40, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(score_samples=500, sample_tokens=8),
)
