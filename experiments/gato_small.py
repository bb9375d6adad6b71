"""Fifteen tasks of five domains, captions and Shakespeare by one network, in the tokens of Gato's paper, one a number.

Needs the extras control, box2d, mujoco, minigrid and metaworld.
"""

from dataclasses import replace
from typing import Any

from cleangpt.config import (
    DataConfig,
    MuonConfig,
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
from cleangpt.corpora.shapes import ShapesCaptions
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.models.vision import VisionConfig

ROW = 128
ACTING = Acting(choices="argmax", see_actions=False)
SAMPLED = replace(ACTING, choices="sample", numbers="sample")
"""For experts that take now this, now that at nearly the same place; their mean would be neither."""
modalities = Modalities(choice_ids="text", image_height=56, image_width=56, image_tokens=49)
ranges = TokenRanges(ByteTokenizer().vocab_size, modalities)


def task(env: str, played: int, acting: Acting = ACTING, **fields: Any) -> Demonstrations:
    """A corpus of an expert's episodes."""
    return Demonstrations(
        env=env,
        played=played,
        row=ROW,
        hide_actions=0.5,
        acting=acting,
        modalities=modalities,
        reference_episodes=20,
        **fields,
    )


def grid(level: str, played: int, view: str = "goals") -> Demonstrations:
    """A corpus of episodes of BabyAI's bot."""
    acting = replace(SAMPLED, temperature=0.3)
    return task(f"BabyAI-{level}-v0", played, acting, arguments=(("view", view),), noisy_share=1.0, learn_text=False)


sources = (
    Source(name="cart_pole", weight=0.5, corpus=task("CartPole-v1", 200)),
    Source(name="acrobot", weight=0.5, corpus=task("Acrobot-v1", 200)),
    Source(name="mountain_car", weight=0.5, corpus=task("MountainCar-v0", 200)),
    Source(name="mountain_car_continuous", weight=0.5, corpus=task("MountainCarContinuous-v0", 150)),
    Source(name="pendulum", corpus=task("Pendulum-v1", 800)),
    Source(name="lunar_lander", weight=2.0, corpus=task("LunarLander-v3", 1200, SAMPLED, least_score=80.0)),
    Source(
        name="lunar_lander_continuous",
        weight=3.0,
        corpus=task("LunarLanderContinuous-v3", 1200, SAMPLED, least_score=80.0),
    ),
    Source(
        name="inverted_pendulum",
        weight=2.5,
        corpus=task("InvertedPendulum-v5", 800, noisy_share=1.0, noise=0.1, burst=1),
    ),
    Source(name="reacher", corpus=task("Reacher-v5", 600)),
    Source(name="go_to_red_ball_grey", weight=1.5, corpus=grid("GoToRedBallGrey", 6000)),
    Source(name="go_to_obj", weight=1.5, corpus=grid("GoToObj", 6000)),
    Source(name="go_to_local", weight=2.5, corpus=grid("GoToLocal", 12_000)),
    Source(name="red_ball_seen", weight=1.5, corpus=grid("GoToRedBallGrey", 3000, "pictures")),
    Source(name="reach", corpus=task("Meta-World/reach-v3", 300)),
    Source(name="button_press", weight=0.5, corpus=task("Meta-World/button-press-v3", 300)),
    Source(
        name="captions",
        corpus=ShapesCaptions(tokenizer="byte", most_shapes=2, row=ROW, side=56, image_tokens=49),
    ),
    Source(name="shakespeare", corpus=ShakespeareChar(tokenizer="byte")),
)

experiment = Experiment(
    name="gato_small",
    corpus=Mixture(sources=sources),
    data=DataConfig(seq_len=ROW, batch_size=64, val_samples=160),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=3,
        n_heads=4,
        dim=96,
        tied=True,
        n_places=64,
        vision=VisionConfig(encoder="gato", height=56, width=56, patch_size=8, dim=32),
    ),
    optimizer=OptimizerConfig(
        lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=20, batches_per_macro_batch=400),
    tracking=TrackingConfig(score_samples=0, sample_tokens=0),
)
