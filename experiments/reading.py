"""Words in pictures, read letter by letter: unseen words in several fonts, sizes, places and greys."""

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
from cleangpt.corpora.rendered_words import HEIGHT, WIDTH, RenderedWords
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import VisionConfig

vision = VisionConfig(encoder="linear", height=HEIGHT, width=WIDTH, channels=1, patch_size=8, bidirectional=True)
corpus = RenderedWords(image_tokens=vision.tokens)

experiment = Experiment(
    name="reading",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64),
    model=LlamaConfig(n_layers=3, n_heads=4, dim=96, hidden_dim=256, rope_theta=100.0, tied=True, vision=vision),
    optimizer=OptimizerConfig(
        lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=24, batches_per_macro_batch=400),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(score_samples=200, sample_tokens=9),
)
