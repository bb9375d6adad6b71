"""Pendulum by PPO from scratch: torques are bins, of which the policy learns which to choose."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.data.modalities import Modalities
from cleangpt.environments.acting import Acting
from cleangpt.environments.config import RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.objectives.ppo import PPO

modalities = Modalities(bins=11, choices=1, separator="none", vector=3, scale="bounds")
corpus = Demonstrations(  # names the simulation and its tokens; a policy does not read the demonstrations
    env="Pendulum-v1", played=8, row=64, modalities=modalities, acting=Acting(numbers="mean", see_actions=False)
)
ranges = corpus.tokenizer().ranges

experiment = Experiment(
    name="pendulum_ppo",
    corpus=corpus,
    data=DataConfig(seq_len=64, batch_size=8),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=1,
        n_heads=4,
        dim=64,
        tied=True,
        n_places=8,
        vector=3,
        smooth_bins=(ranges.first_bin, ranges.first_choice),
    ),
    objective=PPO(gamma=0.97, lam=0.95, clip=0.2, value_coef=0.5, value_clip=10.0),
    rollouts=RolloutConfig(prompts=64, completions=1, passes=10, micro_batch_size=32, measure_kl=False),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=0.5),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1)),
    training=TrainingConfig(macro_batches=24, batches_per_macro_batch=320),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=20, sample_tokens=0),
)
