"""Captions of shapes as text alone, without their pictures: the language model that shapes_vit begins with."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.shapes import ShapesCaptions
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

corpus = ShapesCaptions(pictures=False, image_tokens=9)

experiment = Experiment(
    name="shapes_text",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64),
    model=LlamaConfig(n_layers=3, n_heads=4, dim=96, hidden_dim=256, rope_theta=10_000.0, tied=True),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=3, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(sample_tokens=24),
)
