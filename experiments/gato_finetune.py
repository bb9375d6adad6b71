"""A task that gato_vector has not seen, from few of its expert's episodes; `--init-from None` begins from nothing.

Needs a run of gato_vector in runs/gato_vector, and the extra metaworld.
"""

from cleangpt.config import DataConfig, OptimizerConfig, Schedule, ScheduleConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.objectives.soft_bins import SoftBins

modalities = Modalities(choices=256, vector=40, image_height=56, image_width=56, image_tokens=49)  # gato_vector's
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
    init_from="runs/gato_vector",
    data=DataConfig(seq_len=128, batch_size=16, val_samples=16),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=3,
        n_heads=4,
        dim=96,
        tied=True,
        n_places=64,
        vector=40,
        smooth_bins=(ranges.first_bin, ranges.first_choice),
        vision=VisionConfig(encoder="linear", height=56, width=56, patch_size=8),
    ),
    objective=SoftBins(bins=(ranges.first_bin, ranges.first_choice), sigma=6.0),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=2, batches_per_macro_batch=100),
    tracking=TrackingConfig(score_samples=0, sample_tokens=0),
)
