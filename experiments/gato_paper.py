"""The tasks of gato_small, with the 79M network, batches and optimizer of Gato's paper, and a tenth of its steps.

Text is bytes, since its 32,000 subwords are not published; stochastic depth is missing.

Needs the extras control, box2d, mujoco, minigrid and metaworld.
"""

from typing import Any

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
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.models.vision import VisionConfig

modalities = Modalities(choice_ids="text", image_height=64, image_width=64, image_tokens=16)
ranges = TokenRanges(ByteTokenizer().vocab_size, modalities)


def task(env: str, played: int, choices: Any = "argmax", **fields: Any) -> Demonstrations:
    """A corpus of an expert's episodes."""
    acting = Acting(choices=choices, prompt=50)
    return Demonstrations(
        env=env,
        played=played,
        row=1024,
        prompt_share=0.25,
        least_score=80.0,
        acting=acting,
        modalities=modalities,
        reference_episodes=20,
        scored_episodes=20,
        **fields,
    )


tasks = {
    "cart_pole": task("CartPole-v1", 100),
    "acrobot": task("Acrobot-v1", 200),
    "mountain_car": task("MountainCar-v0", 200),
    "mountain_car_continuous": task("MountainCarContinuous-v0", 150),
    "pendulum": task("Pendulum-v1", 500),
    "lunar_lander": task("LunarLander-v3", 300, "sample"),
    "lunar_lander_continuous": task("LunarLanderContinuous-v3", 300),
    "inverted_pendulum": task("InvertedPendulum-v5", 100, noisy_share=1.0, noise=0.1, burst=1),
    "reacher": task("Reacher-v5", 600),
    "go_to_red_ball_grey": task("BabyAI-GoToRedBallGrey-v0", 1000, "sample"),
    "go_to_obj": task("BabyAI-GoToObj-v0", 1000, "sample"),
    "go_to_local": task("BabyAI-GoToLocal-v0", 1000, "sample"),
    "red_ball_seen": task("BabyAI-GoToRedBallGrey-v0", 500, "sample", arguments=(("view", "pictures"),)),
    "reach": task("Meta-World/reach-v3", 150),
    "button_press": task("Meta-World/button-press-v3", 150),
}

experiment = Experiment(
    name="gato_paper",
    corpus=Mixture(
        sources=(
            *(Source(name=name, corpus=corpus) for name, corpus in tasks.items()),
            Source(name="shakespeare", corpus=ShakespeareChar(tokenizer="byte")),
        )
    ),
    data=DataConfig(seq_len=1024, batch_size=512, val_samples=512),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=8,
        n_heads=24,
        dim=768,
        hidden_dim=3072,
        head_dim=32,
        vision=VisionConfig(encoder="gato", height=64, width=64, patch_size=16, dim=32),
    ),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, clip_norm=None),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.1, warmup=0.15)),
    training=TrainingConfig(macro_batches=100, batches_per_macro_batch=1_000),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=10, sample_tokens=0),
)
