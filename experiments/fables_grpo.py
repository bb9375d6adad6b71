"""`fables_ppo` with GRPO: eight answers to a prompt are compared with each other, and the KL term is in the loss.

Advantages are not standardised: once all answers are good, the least of differences would count as much as the first
ones did, and the KL term for little; docs/policies.md shows what becomes of that.
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
from cleangpt.objectives.grpo import GRPO

experiment = Experiment(
    name="fables_grpo",
    init_from="fables_sft",
    corpus=FableOpenings(),
    data=DataConfig(seq_len=31, batch_size=64),
    model=GPTConfig(max_seq_len=32, n_layers=2, n_heads=4, dim=96),
    objective=GRPO(norm="token", standardise=False, kl_coef=0.02),
    rollouts=RolloutConfig(
        prompts=16,
        completions=8,
        passes=2,
        rewards=(Reward(name="model"), Reward(name="task", weight=0.0)),
        reward_model="fables_reward",
        truncated="punish",
        truncated_reward=-3.0,
    ),
    optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="linear", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=12, batches_per_macro_batch=16),
    saving=SavingConfig(keep_best=1, best="highest train_reward"),
    tracking=TrackingConfig(score_samples=60),
)
