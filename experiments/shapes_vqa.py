"""Questions about pictures of shapes, by a model that has learned to caption them: `cleangpt train shapes_captions`
comes first.

It starts from the newest run of that name; the model is the same. The question stands before the picture, so that every
patch sees it.
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
from cleangpt.corpora.shapes import ShapesVQA
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import VisionConfig

vision = VisionConfig(encoder="linear", height=48, width=48, patch_size=16, bidirectional=True)
corpus = ShapesVQA(image_tokens=vision.tokens)

experiment = Experiment(
    name="shapes_vqa",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=192),
    model=LlamaConfig(n_layers=4, n_heads=4, dim=96, hidden_dim=256, rope_theta=100.0, tied=True, vision=vision),
    optimizer=OptimizerConfig(
        lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=28, batches_per_macro_batch=150),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(score_samples=200, sample_tokens=8),
    init_from="shapes_captions",
)
