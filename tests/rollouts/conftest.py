"""A tiny policy: GRPO on two-digit problems for answers of low digits, rounds of 8 prompts x 4 answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cleangpt.config import DataConfig, SavingConfig, TrainingConfig
from cleangpt.environments.base import Episode
from cleangpt.environments.config import Reward, RolloutConfig
from cleangpt.environments.rewards import REWARDS
from cleangpt.experiment import Experiment
from cleangpt.objectives.grpo import GRPO
from tests.conftest import change


def low(prompt: str, answer: str, episode: Episode) -> float:
    """A reward that an untrained model gets some of."""
    return sum(character in "01234" for character in answer) / 4


LOW = (Reward(name="low"),)


@pytest.fixture
def policy(tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    """Builds a policy experiment of 3 macro-batches, each a round of 4 batches of 8 answers, with fields changed."""

    monkeypatch.setitem(REWARDS, "low", low)

    def build(**fields: Any) -> Experiment:
        experiment = tiny()
        experiment = dataclasses.replace(
            experiment,
            name="policy",
            data=DataConfig(seq_len=experiment.data.seq_len, batch_size=8),
            model=dataclasses.replace(experiment.model, dropout=0.0, vocab_size=16),
            objective=GRPO(norm="token"),
            rollouts=RolloutConfig(prompts=8, completions=4, micro_batch_size=8, rewards=LOW),
            training=TrainingConfig(macro_batches=3, batches_per_macro_batch=4, device="cpu"),
            saving=SavingConfig(best="highest exact_match"),
        )
        return change(experiment, **fields)

    return build
