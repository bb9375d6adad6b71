"""CartPole by PPO from scratch: the policy acts in the simulation, and learns from the rewards."""

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
from cleangpt.data.modalities import Modalities
from cleangpt.environments.acting import Acting
from cleangpt.environments.config import RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.objectives.ppo import PPO

modalities = Modalities(bins=2, choices=2, separator="none", vector=4)
corpus = Demonstrations(  # names the simulation and its tokens; a policy does not read the demonstrations
    env="CartPole-v1", played=8, row=64, modalities=modalities, acting=Acting(choices="argmax", see_actions=False)
)

experiment = Experiment(
    name="cartpole_ppo",
    corpus=corpus,
    data=DataConfig(seq_len=64, batch_size=8),
    model=GatoConfig(
        vocab_size=corpus.tokenizer().vocab_size, n_layers=1, n_heads=4, dim=64, tied=True, n_places=8, vector=4
    ),
    objective=PPO(gamma=0.98, lam=0.9, clip=0.2, value_coef=0.5, value_clip=10.0),
    rollouts=RolloutConfig(prompts=32, completions=1, passes=4, micro_batch_size=32, measure_kl=False),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.0)),
    training=TrainingConfig(macro_batches=14, batches_per_macro_batch=96),
    saving=SavingConfig(keep_best=1, best="highest score"),
    early_stopping=EarlyStoppingConfig(target=100.0),  # every episode lasts 500 steps
    tracking=TrackingConfig(score_samples=20, sample_tokens=0),
)
