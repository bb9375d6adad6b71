"""Handwritten digits named in text, by a small GPT that reads patches of 2 x 2 pixels."""

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
from cleangpt.corpora.digits import Digits
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.vision import VisionConfig

vision = VisionConfig(encoder="linear", height=8, width=8, channels=1, patch_size=2, bidirectional=True)
corpus = Digits(image_tokens=vision.tokens)

experiment = Experiment(
    name="digits_vlm",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=128),
    model=GPTConfig(n_layers=3, n_heads=4, dim=64, vision=vision),
    optimizer=OptimizerConfig(
        lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.1)),
    training=TrainingConfig(macro_batches=10, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(score_samples=137, sample_tokens=6),
)
