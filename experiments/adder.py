"""Three-digit addition, 226 thousand parameters: about a minute on two cores.

More digits need longer rows and more steps. For five:

    cleangpt train adder --corpus.digits 5 --data.seq-len 18 --training.macro-batches 48
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
from cleangpt.corpora.adder import Adder
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

corpus = Adder(digits=3, operator_sign=True, equals_sign=True)

experiment = Experiment(
    name="adder",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=256, val_samples=2000),
    model=GPTConfig(n_layers=2, n_heads=4, dim=96),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=16, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(score_samples=500, sample_tokens=8),
)
