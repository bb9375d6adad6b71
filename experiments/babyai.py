"""Five levels of BabyAI by one network: missions in words, and each object that is seen as one vector.

Needs the extras bpe, control and minigrid.
"""

from cleangpt.config import (
    DataConfig,
    MuonConfig,
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
from cleangpt.data.modalities import Modalities
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig

OBJECT = 78
"""Numbers of an object, 28 of them those of the mission; an observation is eight objects and two maps of the cells."""
WORDS = (
    "a the go to pick up open put next on your left right in front of behind you "
    "ball box door key blue green grey purple red yellow"
)
"""Those of the missions."""


def level(name: str, played: int) -> Demonstrations:
    """A corpus of episodes of the bot."""
    return Demonstrations(
        env=f"BabyAI-{name}-v0",
        arguments=(("view", "objects"),),
        played=played,
        row=128,
        words=WORDS,
        learn_text=False,
        hide_actions=1.0,
        noisy_share=1.0,
        acting=Acting(choices="sample", temperature=0.5, see_actions=False),
        modalities=Modalities(bins=2, choices=16, vector=OBJECT),
    )


levels = {
    "go_to_local": level("GoToLocal", 16_000),
    "pickup_loc": level("PickupLoc", 16_000),
    "go_to_red_ball": level("GoToRedBall", 8_000),
    "open": level("Open", 4_000),
    "put_next_local": level("PutNextLocal", 16_000),
}
weights = {"go_to_local": 0.7, "go_to_red_ball": 0.5, "put_next_local": 2.5}

experiment = Experiment(
    name="babyai",
    corpus=Mixture(
        sources=tuple(
            Source(name=name, weight=weights.get(name, 1.0), corpus=corpus) for name, corpus in levels.items()
        )
    ),
    data=DataConfig(seq_len=128, batch_size=64, val_samples=320),
    model=GatoConfig(
        vocab_size=levels["open"].tokenizer().vocab_size,
        n_layers=4,
        n_heads=4,
        dim=128,
        tied=True,
        n_places=16,
        vector=OBJECT,
    ),
    optimizer=OptimizerConfig(
        lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=16, batches_per_macro_batch=250),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=20, sample_tokens=0),
)
