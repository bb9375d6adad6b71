"""CartPole by PPO from scratch: the policy acts in the simulation, and learns from the rewards."""

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

corpus = Demonstrations(  # names the simulation and its tokens; a policy does not read the demonstrations
    env="CartPole-v1", played=8, row=100, scored_episodes=20, modalities=Modalities(bins=256, choices=2),
    acting=Acting(choices="argmax", see_actions=False),
)  # fmt: skip
ranges = corpus.tokenizer().ranges

experiment = Experiment(
    name="cartpole_ppo",
    corpus=corpus,
    data=DataConfig(seq_len=100, batch_size=16),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=1,
        n_heads=4,
        dim=64,
        tied=True,
        n_places=16,
        smooth_bins=(ranges.first_bin, ranges.first_choice),
    ),
    objective=PPO(gamma=0.98, lam=0.9, clip=0.2, value_coef=0.5, value_clip=10.0, entropy_coef=0.01),
    rollouts=RolloutConfig(prompts=64, completions=1, passes=6, micro_batch_size=32, measure_kl=False),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1)),
    training=TrainingConfig(macro_batches=12, batches_per_macro_batch=96),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=10, sample_tokens=0),
)
