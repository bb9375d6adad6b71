"""A reward model as a reward: on the scale of its validation answers, and known again by a resumed run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.checkpoints.checkpoint import best_checkpoint
from cleangpt.checkpoints.run_folder import read_experiment
from cleangpt.config import DataConfig, OptimizerConfig, SavingConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora import prepare
from cleangpt.corpora.fable_openings import FableOpenings, tokenizer
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.config import Reward, RolloutConfig
from cleangpt.errors import UserError
from cleangpt.evaluation.against import open_judge
from cleangpt.evaluation.rewards import open_reward_model
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import RewardModel
from cleangpt.objectives.ppo import PPO
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.launch import train
from tests.conftest import change

CPU = torch.device("cpu")
PAIRS = FablePreferences(train_pairs=40, val_pairs=20)
OPENINGS = FableOpenings(train_sentences=64, val_sentences=8)


def experiment(name: str, **fields: Any) -> Experiment:
    tracking = TrackingConfig(progress=False, sample_tokens=0, score_samples=6)
    return Experiment(name=name, run_dir=name, optimizer=OptimizerConfig(lr=1e-2), tracking=tracking, **fields)


@pytest.fixture
def runs(workplace: Path) -> Callable[..., Experiment]:
    """A reward model in the folder `reward`; builds a policy of the same size that it rewards."""
    model = GPTConfig(max_seq_len=32, n_layers=1, n_heads=2, dim=16)
    short = TrainingConfig(macro_batches=1, batches_per_macro_batch=4, device="cpu")
    data = DataConfig(seq_len=PAIRS.row, batch_size=16)
    train(experiment("reward", corpus=PAIRS, data=data, model=model, training=short, objective=RewardModel()))
    policy = experiment(
        "policy", corpus=OPENINGS, data=DataConfig(seq_len=31, batch_size=8), model=model, objective=PPO(kl_coef=0.1),
        rollouts=RolloutConfig(
            prompts=8, completions=1, reward_model="reward", rewards=(Reward(name="model"), Reward(weight=0.0))
        ),
        training=TrainingConfig(macro_batches=2, batches_per_macro_batch=1, device="cpu"),
        saving=SavingConfig(best="highest train_reward"),
    )  # fmt: skip
    return lambda **fields: change(policy, **fields)


def validation_answers() -> list[list[int]]:
    split = prepare(PAIRS, Path("data")).sources[0].dataset.splits["val"]
    rows = [split.read_row(row) for row in range(split.documents)]
    return [tokens[: 1 + max(place for place, counts in enumerate(mask) if counts)] for tokens, mask in rows]


def test_scores_of_a_run_have_mean_0_and_standard_deviation_1_over_its_validation_answers(
    runs: Callable[..., Experiment],
) -> None:
    """Of its checkpoint alone, which knows no answers, they are as the model computes them."""
    answers = validation_answers()
    assert len(answers) == 40
    scores = open_reward_model("reward", tokenizer(), CPU).scores(answers)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, rel=1e-5)
    plain = open_reward_model(str(best_checkpoint(Path("reward"))), tokenizer(), CPU).scores(answers)
    torch.testing.assert_close((plain - plain.mean()) / plain.std(), scores, rtol=1e-4, atol=1e-4)
    assert plain.std().item() != pytest.approx(1, abs=0.01)


def test_what_is_not_a_reward_model_of_the_same_tokens_is_refused(runs: Callable[..., Experiment]) -> None:
    for open_one in (open_reward_model, open_judge):
        with pytest.raises(UserError, match="is not that of the answers; allowed: the same tokens"):
            open_one("reward", ByteTokenizer(), CPU)
    train(runs(rollouts__reward_model=None, rollouts__rewards=(Reward(),), training__macro_batches=1))
    with pytest.raises(UserError, match="this model has no head for rewards"):
        train(runs(run_dir="other", rollouts__reward_model="policy"))


def test_a_policy_is_rewarded_by_the_model_and_the_true_score_is_logged_beside_it(
    runs: Callable[..., Experiment],
) -> None:
    run = train(runs(objective=PPO()))
    for row in read_metrics(run):
        assert row["train_reward"] == row["train_reward/model"] != row["train_reward/task"]
    assert "gold" in row


def test_a_run_goes_on_with_the_reward_model_that_it_began_with_or_not_at_all(runs: Callable[..., Experiment]) -> None:
    """Under another name, too; here the newest run of the name has become another."""
    run = train(runs(training__macro_batches=1))
    Path("reward").rename("renamed")
    train(runs(training__macro_batches=2, rollouts__reward_model="renamed"), resumed=run)
    assert len(read_metrics(run)) == 2
    train(change(read_experiment(Path("renamed")), run_dir="reward", training__seed=2))
    with pytest.raises(UserError, match="reward_model is 'reward', which has other weights than when this run began"):
        train(runs(training__macro_batches=3), resumed=run)
