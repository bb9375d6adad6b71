"""Openings of fables with more bright words, by a reward model: PPO on `fables_sft`, rewarded by `fables_reward`.

It learns from the newest run of `fables_reward` alone; the true score is logged beside it, as the reward `task`, whose
weight is 0. See docs/policies.md.
"""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.environments.config import Reward, RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives.ppo import PPO

experiment = Experiment(
    name="fables_ppo",
    init_from="fables_sft",
    corpus=FableOpenings(),
    data=DataConfig(seq_len=31, batch_size=64),
    model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=4, dim=96),
    objective=PPO(kl_coef=0.02, value_coef=0.1),
    rollouts=RolloutConfig(
        prompts=128,
        completions=1,
        passes=2,
        rewards=(Reward(name="model"), Reward(name="task", weight=0.0)),
        reward_model="fables_reward",
        truncated="punish",
        truncated_reward=-3.0,
    ),
    optimizer=OptimizerConfig(
        lr=5e-4, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0, lr_factors=(("heads.*", 10.0),)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=12, batches_per_macro_batch=16),
    saving=SavingConfig(keep_best=1, best="highest train_reward"),
    tracking=TrackingConfig(score_samples=60),
)
