"""LunarLander by PPO from scratch.

Needs the extras control and box2d.
"""

from cleangpt.config import (
    DataConfig,
    EarlyStoppingConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.environments.config import RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.objectives.ppo import PPO

modalities = Modalities(bins=2, choices=4, separator="none", vector=8)

experiment = Experiment(
    name="lunarlander_ppo",
    corpus=Demonstrations(  # names the simulation and its tokens; a policy does not read the demonstrations
        env="LunarLander-v3",
        played=8,
        row=128,
        modalities=modalities,
        acting=Acting(choices="argmax", see_actions=False),
    ),
    data=DataConfig(seq_len=128, batch_size=4),
    model=GatoConfig(
        vocab_size=TokenRanges(ByteTokenizer().vocab_size, modalities).vocab_size,
        n_layers=1,
        n_heads=4,
        dim=64,
        tied=True,
        n_places=8,
        vector=8,
    ),
    objective=PPO(gamma=0.99, lam=0.95, clip=0.2, value_coef=0.5, value_clip=10.0),
    rollouts=RolloutConfig(prompts=64, completions=1, passes=4, micro_batch_size=32, measure_kl=False),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=0.5),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1)),
    training=TrainingConfig(macro_batches=80, batches_per_macro_batch=192),
    saving=SavingConfig(keep_best=1, best="highest score"),
    early_stopping=EarlyStoppingConfig(target=95.0),
    tracking=TrackingConfig(score_samples=20, sample_tokens=0),
)
