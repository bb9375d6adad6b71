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

modalities = Modalities(bins=11, choices=1, separator="none", vector=3)
corpus = Demonstrations(  # names the simulation and its tokens; a policy does not read the demonstrations
    env="Pendulum-v1", played=8, row=64, modalities=modalities, acting=Acting(numbers="mean", see_actions=False)
)

experiment = Experiment(
    name="pendulum_ppo",
    corpus=corpus,
    data=DataConfig(seq_len=64, batch_size=8),
    model=GatoConfig(
        vocab_size=corpus.tokenizer().vocab_size, n_layers=1, n_heads=4, dim=64, tied=True, n_places=8, vector=3
    ),
    objective=PPO(gamma=0.9, lam=0.95, clip=0.2, value_coef=0.5, value_clip=10.0),
    rollouts=RolloutConfig(prompts=32, completions=1, passes=8, micro_batch_size=32, measure_kl=False),
    optimizer=OptimizerConfig(lr=7e-4, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.0)),
    training=TrainingConfig(macro_batches=16, batches_per_macro_batch=128),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=10, sample_tokens=0),
)
