"""The first of two stages, as in LLaVA: a vision transformer before a language model; the projector alone is trained.

`cleangpt train shapes_text` comes first; the model starts from the newest run of that name. A tower that has been
trained would be named in `encoder_from`, such as hf:openai/clip-vit-base-patch32, and described by
`cleangpt.interchange.towers.read_vision`. This one is random, so that the second stage does most of the work.
"""

from cleangpt.config import (
    DataConfig,
    FineTuningConfig,
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
from cleangpt.models.vision import VisionConfig

vision = VisionConfig(
    encoder="vit", height=48, width=48, patch_size=8, dim=64, n_layers=2, n_heads=4, merge=2, projector_dim=96
)
corpus = ShapesCaptions(image_tokens=vision.tokens)

experiment = Experiment(
    name="shapes_vit_projector",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=64),
    model=LlamaConfig(n_layers=3, n_heads=4, dim=96, hidden_dim=256, rope_theta=10_000.0, tied=True, vision=vision),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.01, warmup=0.05)),
    training=TrainingConfig(macro_batches=2, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(score_samples=100, sample_tokens=24),
    init_from="shapes_text",
    fine_tuning=FineTuningConfig(
        freeze=(
            "token_embedding.*",
            "blocks.*",
            "final_norm.*",
            "vision.encoder.patch_embedding.*",
            "vision.encoder.position_embedding.*",
            "vision.encoder.blocks.*",
            "vision.encoder.final_norm.*",
        )
    ),
)
