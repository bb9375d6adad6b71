"""A policy's run: the reference stays the start, metrics tell what happened, and the best checkpoint is by reward."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cleangpt.checkpoints.checkpoint import best_checkpoint
from cleangpt.config import LoRAConfig
from cleangpt.environments.config import Reward
from cleangpt.errors import UserError
from cleangpt.evaluation.evaluate import evaluate_run
from cleangpt.experiment import Experiment
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.ppo import PPO
from cleangpt.objectives.rloo import RLOO
from cleangpt.rollouts.rounds import explained_variance
from cleangpt.rollouts.source import RolloutSource
from cleangpt.tracking.metrics import read_metrics, read_samples, read_steps
from cleangpt.tracking.report import write_report
from cleangpt.training.launch import train
from cleangpt.training.trainer import Trainer

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]
TOKENS = torch.tensor([[1, 2, 10, 3, 4, 11, 5, 6, 7], [9, 0, 10, 3, 3, 11, 1, 2, 12]])


@torch.no_grad()
def logits_of(model: LanguageModel) -> Tensor:
    found: Any = model(TOKENS)
    return found.clone()


@pytest.fixture
def base(tiny: Build, trainer: Open) -> str:
    """A run to start from."""
    trainer(tiny(run_dir="base", training__macro_batches=1)).train()
    return "base"


@pytest.fixture
def adapted_base(policy: Build, trainer: Open, base: str) -> str:
    """A policy to start from whose adapters have learned."""
    trainer(policy(run_dir="adapted", init_from=base, fine_tuning__lora=LoRAConfig(rank=2), optimizer__lr=1e-2)).train()
    return "adapted"


@pytest.mark.default(1)
@pytest.mark.parametrize(
    ("start", "adapted"), [("base", False), ("base", True), ("adapted_base", True), ("adapted_base", False)]
)
def test_the_reference_is_the_model_at_the_start_bit_for_bit(
    policy: Build, trainer: Open, start: str, adapted: bool, request: pytest.FixtureRequest
) -> None:
    """A copy, or the model with its adapters off; also where it starts from adapters that had learned before."""
    base = request.getfixturevalue(start)
    fields: dict[str, Any] = {"fine_tuning__lora": LoRAConfig(rank=2)} if adapted else {}
    opened = trainer(policy(run_dir="run", init_from=base, objective=GRPO(kl_coef=0.1), **fields))
    before = logits_of(opened.model)
    opened.train()
    source = opened.source
    assert isinstance(source, RolloutSource) and source.reference is not None
    assert not torch.equal(logits_of(opened.model), before)
    assert torch.equal(source.reference.call(logits_of), before)
    assert (source.reference.copy is None) == adapted, "no second copy beside adapters"
    resumed = trainer(policy(run_dir="run", init_from=base, objective=GRPO(kl_coef=0.1), **fields)).source
    assert isinstance(resumed, RolloutSource) and resumed.reference is not None
    assert torch.equal(resumed.reference.call(logits_of), before)


@pytest.mark.slow
def test_the_divergence_is_0_at_the_start_and_grows(policy: Build, trainer: Open) -> None:
    trainer(policy(run_dir="run", training__macro_batches=4, optimizer__lr=3e-2)).train()
    kl = [(row["train_kl"], row["train_kl_k3"]) for row in read_metrics(Path("run"))]
    assert kl[0] == pytest.approx((0, 0), abs=1e-4)
    assert kl[-1][0] > 0.01 and kl[-1][1] > 0.01


def test_a_run_records_what_its_rounds_were(policy: Build, trainer: Open) -> None:
    opened = trainer(policy(run_dir="run", objective=PPO(kl_coef=0.1), tracking__every=1))
    rounds = []
    collect = opened.source.collector.collect  # type: ignore[attr-defined]
    opened.source.collector.collect = lambda first: rounds.append(collect(first)) or rounds[-1]  # type: ignore
    opened.train()
    for row, collected in zip(read_metrics(Path("run")), rounds, strict=True):
        totals = [sum(answer.total) for answer in collected.answers]
        assert row["train_reward"] == row["train_reward/low"] == pytest.approx(np.mean(totals))
        assert row["train_reward_std"] == pytest.approx(np.std(totals))
        assert row["train_answer_length"] == np.mean([answer.length for answer in collected.answers])
        lengths = {True: [], False: []}  # type: dict[bool, list[int]]
        for answer, total in zip(collected.answers, totals, strict=True):
            lengths[total > np.mean(totals)].append(answer.length)
        assert row["train_length_of_better"] == np.mean(lengths[True])
        assert row["train_length_of_worse"] == np.mean(lengths[False])
        everything = [logprob for answer in collected.answers for logprob in answer.logprobs]
        assert row["train_entropy"] == pytest.approx(-np.mean(everything))
        assert {"train_value_loss", "train_explained_variance", "train_kl_coef", "train_truncated_share"} <= row.keys()
        assert row["train_sampled_tokens_per_second"] > 0 < row["train_learned_tokens_per_second"]
        assert "exact_match" in row and "val_loss" not in row and 0 < row["data_wait_share"] < 1
    assert {"clip_low", "clip_high", "ratio_max", "logprob_gap_max", "value_loss"} <= read_steps(Path("run"))[0].keys()
    assert "[reward " in read_samples(Path("run"))[0]["text"] and "+" in read_samples(Path("run"))[0]["text"]


@pytest.mark.slow
def test_the_report_shows_reward_against_divergence(policy: Build, trainer: Open) -> None:
    trainer(policy(run_dir="run")).train()
    page = write_report([Path("run")]).read_text(encoding="utf-8")
    assert "Reward against KL" in page and "Rollouts" in page and "Exact match <b>" in page


def test_the_best_checkpoint_is_the_one_with_the_highest_reward(policy: Build, trainer: Open) -> None:
    opened = trainer(
        policy(run_dir="run", saving__best="highest reached", saving__keep_best=2, training__macro_batches=5)
    )
    rewards = iter([0.2, 0.5, 0.1, 0.5, 0.3])
    opened.recorder.scores = lambda: {"reached": next(rewards)}
    opened.train()
    index = json.loads(Path("run/checkpoints/index.json").read_text())["checkpoints"]
    assert [entry["name"] for entry in index] == ["val_reached0.5000_mb000002", "val_reached0.5000_mb000004"]
    assert best_checkpoint(Path("run")).name == "val_reached0.5000_mb000002"


@pytest.mark.slow
def test_training_stops_when_the_metric_reaches_its_target_or_no_longer_rises(policy: Build, trainer: Open) -> None:
    for fields, expected in (({"early_stopping__target": 0.4}, 2), ({"early_stopping__patience": 2}, 4)):
        opened = trainer(policy(run_dir=str(expected), training__macro_batches=6, **fields))
        rewards = iter([0.2, 0.5, 0.1, 0.4, 0.3, 0.2])
        opened.recorder.scores = lambda rewards=rewards: {"exact_match": next(rewards)}
        assert opened.train() == "stopped early"
        assert opened.position.macro_batch == expected


def test_a_metric_that_does_not_exist_is_named_and_the_macro_batch_is_not_lost(policy: Build, trainer: Open) -> None:
    trainer(policy(run_dir="whole")).train()
    with pytest.raises(
        UserError, match=r"saving.best names 'exact_mach', which is not a metric.*did you mean 'exact_match'.*is saved"
    ):
        trainer(policy(run_dir="run", saving__best="highest exact_mach", saving__snapshot_every=2)).train()
    assert [row["macro_batch"] for row in read_metrics(Path("run"))] == [1]
    train(policy(run_dir="run"), resumed=Path("run"))
    losses = [[row["train_loss"] for row in read_metrics(Path(run))] for run in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_policy_is_evaluated_by_its_tasks(policy: Build, trainer: Open) -> None:
    trainer(policy(run_dir="run")).train()
    metrics = evaluate_run(Path("run"), None, "val", torch.device("cpu"))
    assert 0 <= metrics["exact_match"] <= 1 and "loss" not in metrics


def test_dynamic_sampling_moves_on_in_the_prompts(policy: Build, trainer: Open) -> None:
    """Two positions: samples trained on, and prompts drawn."""
    opened = trainer(policy(rollouts__dynamic_sampling=True, rollouts__max_draws=3, rollouts__rewards=(Reward(),)))
    for _ in range(5):
        opened.source.next()
    state = opened.source.state_dict()
    assert state["samples"] == 40 and state["prompts"] == 48, "nothing is right yet, so every round draws three times"


def test_samples_left_out_after_a_spike_leave_out_their_prompts(policy: Build, trainer: Open) -> None:
    source = trainer(policy()).source
    assert isinstance(source, RolloutSource)
    drawn = []
    collect = source.collector.collect
    source.collector.collect = lambda first: drawn.append(first) or collect(first)  # type: ignore
    start = source.state_dict()
    for _ in range(5):
        source.next()
    source.skip(0, 40)
    source.load_state_dict(start)
    source.next()
    assert drawn == [0, 8, 10]
    assert source.state_dict()["skipped_ranges"] == [[0, 40]]


def test_importance_weights_between_sampler_and_trainer_are_near_1_and_truncated(policy: Build, trainer: Open) -> None:
    fields = {"rollouts__old_logprobs": "recomputed", "rollouts__importance_cap": 2.0}
    plain, weighted = (trainer(policy(run_dir=name, **more)) for name, more in (("one", {}), ("two", fields)))
    one, two = plain.source.next(), weighted.source.next()
    torch.testing.assert_close(one.extras["advantages"], two.extras["advantages"], rtol=1e-4, atol=1e-6)
    capped = trainer(policy(run_dir="three", rollouts__measure_kl=False, **fields)).source
    assert isinstance(capped, RolloutSource)
    capped._scores = lambda model, tokens, mask, heads: {"logprobs": torch.full(mask.shape, 100.0)}  # type: ignore
    torch.testing.assert_close(capped.next().extras["advantages"], 2 * one.extras["advantages"])


def test_importance_weights_of_a_bf16_sampler_are_the_ratios_of_its_rounding(policy: Build, trainer: Open) -> None:
    """The sampler rounds to bf16 and the trainer, here, does not, so that they differ on every processor."""

    def opened(name: str, **fields: Any) -> RolloutSource:
        one = trainer(policy(run_dir=name, training__precision="bf16", **fields))
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.mul_(4)  # logits that differ, as those of a trained model do
        source = one.source
        assert isinstance(source, RolloutSource)
        scores = source._scores

        def in_fp32(*given: Any) -> dict[str, Tensor]:
            source.autocast = nullcontext()
            return scores(*given)

        source._scores = in_fp32  # type: ignore[method-assign]
        source.next()
        return source

    sampled = opened("one")
    looked_back = opened("two", rollouts__old_logprobs="recomputed")
    weighted = opened("three", rollouts__old_logprobs="recomputed", rollouts__importance_cap=1.005)
    mask = sampled.rows["mask"]
    ratio = (looked_back.rows["old_logprobs"] - sampled.rows["old_logprobs"]).exp()[mask]
    assert 0.005 < (ratio - 1).abs().max() < 0.2 and 1e-5 < (ratio - 1).abs().mean() < 2e-2
    assert looked_back.rows["advantages"].equal(sampled.rows["advantages"])
    expected = sampled.rows["advantages"][mask] * ratio.clamp(max=1.005)
    torch.testing.assert_close(weighted.rows["advantages"][mask], expected)


def test_the_kl_term_of_the_reward_is_in_the_advantages(policy: Build, trainer: Open) -> None:
    """RLOO's advantages with another reference differ by the k1 of each answer, less the mean of the others."""
    opened = trainer(policy(objective=RLOO(kl_coef=0.5), rollouts__rewards=(Reward(),)))
    source = opened.source
    assert isinstance(source, RolloutSource) and source.reference is not None
    shift = torch.linspace(-1, 1, 32 * 9, dtype=torch.float64).view(32, 9)
    logprobs: list[Tensor] = []
    source.reference.call = lambda score: logprobs.append(score(opened.model)) or logprobs[0] + shift  # type: ignore
    source.next()
    rows = source.rows
    k1 = -(shift * rows["mask"]).sum(dim=1)
    rewards = torch.zeros(32, dtype=torch.float64)  # an untrained model has nothing right
    scores = (rewards - 0.5 * k1).view(8, 4)
    expected = scores - (scores.sum(dim=1, keepdim=True) - scores) / 3
    found = rows["advantages"].gather(1, rows["mask"].int().argmax(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(found.double(), expected.flatten(), rtol=1e-3, atol=1e-3)


def test_explained_variance_is_1_for_the_returns_themselves_and_0_for_a_constant() -> None:
    returns, mask = torch.randn(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.bool)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns, 0 * returns + 3, mask) == pytest.approx(0)
    assert explained_variance(0 * returns, returns, mask) == 0
