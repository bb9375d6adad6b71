"""Three-digit addition with a Llama of 316 thousand parameters, to compare with `adder`: about two minutes on one core.

Rotary positions tell distances only: the wavelengths fit a row of some 20 tokens (`rope_theta`), and each of the eight
distances at which five digits need others has a head (docs/log.md). For five digits:

    cleangpt train adder_llama --corpus.digits 5 --data.seq-len 18 --training.macro-batches 20
"""

from cleangpt.config import (
    DataConfig,
    MuonConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.adder import Adder
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

corpus = Adder(digits=3, operator_sign=True, equals_sign=True)

experiment = Experiment(
    name="adder_llama",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64, val_samples=2000),
    model=LlamaConfig(n_layers=2, n_heads=8, head_dim=24, dim=96, hidden_dim=288, rope_theta=10.0),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2)),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=12, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(score_samples=500, sample_tokens=8),
)
