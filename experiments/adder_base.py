"""`adder`, stopped as soon as it adds 40 % of the problems right by its most likely answers: where the policies start.

Learning to add crosses a sharp transition, from 10 % to 90 % within 200 steps, so the base is chosen by its score.
"""

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
from cleangpt.corpora.adder import Adder
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

corpus = Adder(digits=3, operator_sign=True, equals_sign=True)

experiment = Experiment(
    name="adder_base",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=256, val_samples=500),
    model=GPTConfig(n_layers=2, n_heads=4, dim=96),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=140, batches_per_macro_batch=5),
    early_stopping=EarlyStoppingConfig(target=0.4),
    saving=SavingConfig(keep_best=1, best="highest exact_match", snapshot_every=100),
    tracking=TrackingConfig(score_samples=1000, sample_tokens=8),
)
