"""Five levels of BabyAI by one network: missions in words, and each cell that is seen as a token.

Needs the extras control and minigrid.
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
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.mixture import Mixture
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig

modalities = Modalities(bins=2, choices=256)
ranges = TokenRanges(ByteTokenizer().vocab_size, modalities)


def level(name: str) -> Demonstrations:
    """A corpus of episodes of the bot."""
    return Demonstrations(
        env=f"BabyAI-{name}-v0",
        played=10_000,
        row=288,
        hide_actions=0.5,
        acting=Acting(choices="sample", temperature=0.5, see_actions=False),
        modalities=modalities,
    )


levels = {
    "go_to_local": level("GoToLocal"),
    "pickup_loc": level("PickupLoc"),
    "go_to_red_ball": level("GoToRedBall"),
    "open": level("Open"),
    "put_next_local": level("PutNextLocal"),
}

experiment = Experiment(
    name="babyai",
    corpus=Mixture(sources=tuple(Source(name=name, corpus=corpus) for name, corpus in levels.items())),
    data=DataConfig(seq_len=288, batch_size=64, val_samples=320),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=4,
        n_heads=4,
        dim=128,
        tied=True,
        n_places=64,
    ),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=20, batches_per_macro_batch=500),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=20, sample_tokens=0),
)
