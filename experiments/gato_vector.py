"""Fifteen tasks of five domains and Shakespeare by one network, one embedded vector per observation.

Needs the extras control, box2d, mujoco, minigrid and metaworld.
"""

from typing import Any

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    Schedule,
    ScheduleConfig,
    Source,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.objectives.soft_bins import SoftBins

VECTOR = 40  # as many numbers as Meta-World's observations have, and one to spare
modalities = Modalities(choices=256, vector=VECTOR, image_height=56, image_width=56, image_tokens=49)
ranges = TokenRanges(ByteTokenizer().vocab_size, modalities)


def task(env: str, played: int, choices: Any = "argmax", **fields: Any) -> Demonstrations:
    """A corpus of an expert's episodes."""
    acting = Acting(choices=choices, see_actions=False)
    return Demonstrations(
        env=env,
        played=played,
        row=128,
        hide_actions=0.5,
        acting=acting,
        modalities=modalities,
        reference_episodes=20,
        scored_episodes=20,
        **fields,
    )


tasks = {
    "cart_pole": task("CartPole-v1", 200),
    "acrobot": task("Acrobot-v1", 200),
    "mountain_car": task("MountainCar-v0", 200),
    "mountain_car_continuous": task("MountainCarContinuous-v0", 150),
    "pendulum": task("Pendulum-v1", 800),
    "lunar_lander": task("LunarLander-v3", 600, "sample", least_score=80.0),
    "lunar_lander_continuous": task("LunarLanderContinuous-v3", 600, least_score=80.0),
    "inverted_pendulum": task("InvertedPendulum-v5", 200, noisy_share=1.0, noise=0.1, burst=1),
    "reacher": task("Reacher-v5", 600),
    "go_to_red_ball_grey": task("BabyAI-GoToRedBallGrey-v0", 4000, "sample"),
    "go_to_obj": task("BabyAI-GoToObj-v0", 4000, "sample"),
    "go_to_local": task("BabyAI-GoToLocal-v0", 4000, "sample"),
    "red_ball_seen": task("BabyAI-GoToRedBallGrey-v0", 1500, "sample", arguments=(("view", "pictures"),)),
    "reach": task("Meta-World/reach-v3", 300),
    "button_press": task("Meta-World/button-press-v3", 300),
}

experiment = Experiment(
    name="gato_vector",
    corpus=Mixture(
        sources=(
            *(Source(name=name, corpus=corpus) for name, corpus in tasks.items()),
            Source(name="shakespeare", corpus=ShakespeareChar(tokenizer="byte")),
        )
    ),
    data=DataConfig(seq_len=128, batch_size=64, val_samples=160),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=3,
        n_heads=4,
        dim=96,
        tied=True,
        n_places=64,
        vector=VECTOR,
        smooth_bins=(ranges.first_bin, ranges.first_choice),
        vision=VisionConfig(encoder="linear", height=56, width=56, patch_size=8),
    ),
    objective=SoftBins(bins=(ranges.first_bin, ranges.first_choice), sigma=6.0),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=13, batches_per_macro_batch=150),
    tracking=TrackingConfig(score_samples=0, sample_tokens=0),
)
