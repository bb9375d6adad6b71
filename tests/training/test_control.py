"""A policy that has imitated goes on by rewards."""

from pathlib import Path
from typing import Any

import pytest

import cleangpt
from cleangpt.config import DataConfig, OptimizerConfig, SavingConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.data.modalities import Modalities
from cleangpt.environments.acting import Acting
from cleangpt.environments.config import RolloutConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.objectives.base import Objective
from cleangpt.objectives.next_token import NextToken
from cleangpt.objectives.ppo import PPO
from cleangpt.tracking.metrics import read_metrics

pytest.importorskip("gymnasium")
CORPUS = Demonstrations(
    env="CartPole-v1", arguments=(("max_episode_steps", 60),), played=20, row=64, hide_actions=1.0,
    modalities=Modalities(bins=2, choices=2, separator="none", vector=4), reference_episodes=5, scored_episodes=8,
    acting=Acting(choices="argmax", see_actions=False),
)  # fmt: skip


def trained(folder: Path, name: str, objective: Objective, lr: float, **fields: Any) -> list[dict[str, Any]]:
    """Trains for two macro-batches; returns their metrics."""
    experiment = Experiment(
        name=name, corpus=CORPUS, objective=objective, run_dir=str(folder / name),
        data=DataConfig(seq_len=64, batch_size=8, val_samples=2, folder=str(folder / "data")),
        model=GatoConfig(n_layers=1, n_heads=2, dim=32, tied=True, n_places=8, vector=4),
        rollouts=RolloutConfig(prompts=16, completions=1, passes=4, micro_batch_size=16, measure_kl=False),
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.0),
        training=TrainingConfig(macro_batches=2, batches_per_macro_batch=40, device="cpu"),
        saving=SavingConfig(best="highest score"), tracking=TrackingConfig(score_samples=8, sample_tokens=0),
        **fields,
    )  # fmt: skip
    cleangpt.train(experiment)
    return read_metrics(Path(experiment.run_dir))


@pytest.mark.slow
def test_ppo_goes_on_from_an_agent_that_has_imitated(tmp_path: Path) -> None:
    cloned = trained(tmp_path, "cloned", NextToken(), 1e-2)
    policy = PPO(gamma=0.98, lam=0.9, value_clip=10.0)
    fresh = trained(tmp_path, "fresh", policy, 1e-3)
    continued = trained(tmp_path, "continued", policy, 1e-3, init_from=str(tmp_path / "cloned"))
    assert cloned[-1]["score"] > 60 > fresh[0]["score"]
    assert continued[0]["train_return"] > 1.3 * fresh[0]["train_return"]
    assert continued[-1]["score"] > 60
