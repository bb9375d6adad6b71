"""A task that gato_small has not seen, from few of its expert's episodes; `--init-from None` begins from nothing.

Needs a run of gato_small in runs/gato_small, and the extra metaworld.
"""

from cleangpt.config import DataConfig, OptimizerConfig, Schedule, ScheduleConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.models.vision import VisionConfig

modalities = Modalities(choice_ids="text", image_height=56, image_width=56, image_tokens=49)  # gato_small's
ranges = TokenRanges(ByteTokenizer().vocab_size, modalities)

experiment = Experiment(
    name="gato_finetune",
    corpus=Demonstrations(
        env="Meta-World/button-press-topdown-v3",
        played=30,
        row=128,
        hide_actions=0.5,
        acting=Acting(see_actions=False),
        modalities=modalities,
        reference_episodes=20,
    ),
    init_from="runs/gato_small",
    data=DataConfig(seq_len=128, batch_size=16, val_samples=16),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=3,
        n_heads=4,
        dim=96,
        tied=True,
        n_places=64,
        vision=VisionConfig(encoder="gato", height=56, width=56, patch_size=8, dim=32),
    ),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=5, batches_per_macro_batch=100),
    tracking=TrackingConfig(score_samples=0, sample_tokens=0),
)
