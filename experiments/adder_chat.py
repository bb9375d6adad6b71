"""Two-digit addition taught as conversations in which the answer shows its work; the loss counts answers only."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

corpus = AdderChat(digits=2)

experiment = Experiment(
    name="adder_chat",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64),
    model=LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=2, dim=96, hidden_dim=288, rope_theta=10_000.0),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=10, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(score_samples=200, sample_tokens=8),
)
