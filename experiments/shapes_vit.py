"""The second of two stages: tower, projector and language model together, on pictures and on the text of before.

`cleangpt train shapes_vit_projector` comes first; the model starts from the newest run of that name. A sample in five
is text alone, so that what the language model knew stays; it learns at half of the tower's rate.
"""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    Source,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.shapes import ShapesCaptions
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import VisionConfig

vision = VisionConfig(
    encoder="vit", height=48, width=48, patch_size=8, dim=64, n_layers=2, n_heads=4, merge=2, projector_dim=96
)
corpus = ShapesCaptions(image_tokens=vision.tokens)

experiment = Experiment(
    name="shapes_vit",
    corpus=Mixture(
        sources=(
            Source(name="pictures", corpus=corpus, weight=0.8),
            Source(name="text", corpus=ShapesCaptions(pictures=False, image_tokens=vision.tokens), weight=0.2),
        )
    ),
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64),
    model=LlamaConfig(n_layers=3, n_heads=4, dim=96, hidden_dim=256, rope_theta=10_000.0, tied=True, vision=vision),
    optimizer=OptimizerConfig(
        lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, lr_factors=(("vision.*", 1.0), ("*", 0.5))
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=10, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(score_samples=100, sample_tokens=24),
    init_from="shapes_vit_projector",
)
