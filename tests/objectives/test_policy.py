"""Policy objectives are their papers' equations, and stay themselves under padding, masks, splits and overflow."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.errors import UserError
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.policy import (
    PolicyObjective,
    Round,
    gae,
    group_advantages,
    kl_loss,
    leave_one_out,
    whiten,
)
from cleangpt.objectives.ppo import PPO, clipped_value_loss
from cleangpt.objectives.reinforce import Reinforce
from cleangpt.objectives.reinforce_plus_plus import ReinforcePlusPlus
from cleangpt.objectives.rloo import RLOO
from tests.objectives.policies import F64, Given, loss_and_gradients, random_batch

OBJECTIVES: dict[str, PolicyObjective] = {
    "reinforce": Reinforce(),
    "reinforce++": ReinforcePlusPlus(clip_high=0.28),
    "rloo": RLOO(),
    "grpo": GRPO(kl_coef=0.1),
    "grpo_k2": GRPO(kl_coef=0.1, kl_estimator="k2"),
    "dapo": GRPO(norm="token", clip_high=0.28),
    "dr_grpo": GRPO(norm="constant", constant_length=5.0, standardise=False),
    "gspo": GRPO(ratio="sequence", clip_low=0.03, clip_high=0.04),
    "ppo": PPO(),
    "entropy": GRPO(norm="token", entropy_coef=0.1),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


# Closed forms ---------------------------------------------------------------------------------------------------------
def plain_loss(name: str, objective: Any, batch: Batch, scores: dict[str, Tensor]) -> Tensor:
    """The mean loss token by token, in Python numbers, as the papers write it."""
    mask, extras = batch.targets != IGNORED, batch.extras
    answers, tokens = [], []
    for row in range(len(mask)):
        places = [place for place in range(mask.shape[1]) if mask[row, place]]
        ratios = [scores["logprobs"][row, t] - extras["old_logprobs"][row, t] for t in places]
        advantage = extras["advantages"][row, places[0]] if places else torch.zeros((), dtype=F64)
        if isinstance(objective, Reinforce):
            answers.append(-advantage * sum(scores["logprobs"][row, t] for t in places))
            continue
        if isinstance(objective, RLOO):
            ratio = sum(ratios).exp()
            answers.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            continue
        low, high = (objective.clip,) * 2 if isinstance(objective, PPO) else (objective.clip_low, objective.clip_high)
        if name == "gspo":
            ratios = [sum(ratios) / len(ratios)] * len(ratios)
        losses = []
        for ratio, t in zip(ratios, places, strict=True):
            ratio = ratio.exp()
            own = extras["advantages"][row, t]
            loss = -torch.min(ratio * own, ratio.clamp(1 - low, 1 + high) * own)
            if name.startswith("grpo"):
                d = scores["logprobs"][row, t] - extras["reference_logprobs"][row, t]
                weight = (scores["logprobs"][row, t] - extras["old_logprobs"][row, t]).exp()
                loss = loss + 0.1 * (d**2 / 2 if name == "grpo_k2" else weight * ((-d).exp() - 1 + d))
            if name == "entropy":
                loss = loss - 0.1 * scores["entropy"][row, t]
            if name == "ppo":
                value, old, goal = scores["value"][row, t], extras["old_values"][row, t], extras["returns"][row, t]
                near = old + (value - old).clamp(-0.2, 0.2)
                loss = loss + 0.5 * torch.max((value - goal) ** 2, (near - goal) ** 2) / 2
            losses.append(loss)
        tokens += losses
        answers.append(sum(losses) / (5 if name == "dr_grpo" else len(losses)))
    per_token = name in ("dapo", "ppo", "entropy", "reinforce++")
    return sum(tokens) / len(tokens) if per_token else sum(answers) / len(answers)  # type: ignore


@each_objective
def test_a_loss_and_its_gradients_are_the_equation_to_float64(name: str) -> None:
    batch, scores = random_batch()
    value, gradients = loss_and_gradients(OBJECTIVES[name], batch, scores)
    leaves = {key: score.clone().requires_grad_() for key, score in scores.items()}
    expected = plain_loss(name, OBJECTIVES[name], batch, leaves)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    for key, leaf in leaves.items():
        theirs = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        torch.testing.assert_close(gradients[key], theirs, rtol=1e-12, atol=1e-14)


# What must not change a loss ------------------------------------------------------------------------------------------
def padded(batch: Batch, scores: dict[str, Tensor], columns: int) -> tuple[Batch, dict[str, Tensor]]:
    """The same answers, with padding whose numbers are NaN."""

    def pad(tensor: Tensor) -> Tensor:
        more = torch.full((len(tensor), columns), math.nan, dtype=F64)
        return torch.cat([tensor, more], dim=1) if tensor.dim() == 2 else tensor

    targets = torch.cat([batch.targets, torch.full((len(batch), columns), IGNORED)], dim=1)
    tokens = torch.cat([batch.inputs["tokens"], torch.zeros(len(batch), columns, dtype=torch.int64)], dim=1)
    extras = {name: pad(extra) for name, extra in batch.extras.items()}
    return Batch({"tokens": tokens}, targets, extras), {name: pad(score) for name, score in scores.items()}


def without_heads(name: str, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return scores if name == "ppo" else {key: score for key, score in scores.items() if key != "value"}


@each_objective
def test_padding_changes_nothing_even_if_it_is_nan(name: str) -> None:
    batch, scores = random_batch()
    value, gradients = loss_and_gradients(OBJECTIVES[name], batch, without_heads(name, scores))
    longer, more = padded(batch, without_heads(name, scores), 3)
    again, others = loss_and_gradients(OBJECTIVES[name], longer, more)
    assert again == pytest.approx(value, rel=1e-12)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key][:, :7], gradient, rtol=1e-9, atol=1e-12)


@each_objective
def test_masking_an_answer_is_leaving_it_out(name: str) -> None:
    batch, scores = random_batch()
    masked = replace(batch, targets=batch.targets.clone())
    masked.targets[3] = IGNORED
    rest = torch.tensor([0, 1, 2, 4, 5])
    less = {key: score[rest] for key, score in scores.items()}
    assert loss_and_gradients(OBJECTIVES[name], masked, scores)[0] == pytest.approx(
        loss_and_gradients(OBJECTIVES[name], batch.rows(rest), less)[0], rel=1e-9
    )


@each_objective
def test_a_batch_without_any_answer_gives_0(name: str) -> None:
    batch, scores = random_batch()
    batch = replace(batch, targets=torch.full_like(batch.targets, IGNORED))
    value, gradients = loss_and_gradients(OBJECTIVES[name], batch, scores)
    assert value == 0 and not any(gradient.any() for gradient in gradients.values())


@each_objective
def test_the_gradient_is_the_same_for_every_micro_batch(name: str) -> None:
    batch, scores = random_batch(rows=12)
    objective = OBJECTIVES[name]
    _, whole = loss_and_gradients(objective, batch, scores)
    for size in (1, 3, 5):
        leaves = {key: score.clone().requires_grad_() for key, score in scores.items()}
        for start in range(0, 12, size):
            rows = slice(start, start + size)
            part = Given(**{key: leaf[rows] for key, leaf in leaves.items()})
            (objective(part, batch.rows(rows)).total / objective.count(batch)).backward()  # type: ignore[arg-type]
        for key, leaf in leaves.items():
            found = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            torch.testing.assert_close(found, whole[key], rtol=1e-6, atol=1e-9)


@each_objective
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_a_log_ratio_that_would_overflow_gives_a_finite_gradient(name: str, log_ratio: float) -> None:
    batch, scores = random_batch()
    value, gradients = loss_and_gradients(
        OBJECTIVES[name], batch, scores | {"logprobs": scores["logprobs"] + log_ratio}
    )
    assert math.isfinite(value) and all(gradient.isfinite().all() for gradient in gradients.values())


def test_metrics_say_what_clipping_does() -> None:
    batch, scores = random_batch()
    batch.extras["fresh"][:2] = 1
    mask = batch.targets != IGNORED
    metrics = GRPO(norm="token")(Given(scores["logprobs"]), batch).metrics  # type: ignore[arg-type]
    ratio = (scores["logprobs"] - batch.extras["old_logprobs"]).exp()[mask]
    advantages = batch.extras["advantages"][mask]
    assert int(metrics["clip_high"]) == int(((ratio > 1.2) & (advantages > 0)).sum()) > 0
    assert int(metrics["clip_low"]) == int(((ratio < 0.8) & (advantages < 0)).sum()) > 0
    assert float(metrics["ratio_max"]) == pytest.approx(float(ratio.max()))
    gap = (scores["logprobs"] - batch.extras["old_logprobs"]).abs()[:2][mask[:2]].max()
    assert float(metrics["logprob_gap_max"]) == pytest.approx(float(gap))


# KL estimators, by enumeration ----------------------------------------------------------------------------------------
def distributions(seed: int = 0, size: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(size, generator=generator, dtype=F64) for _ in range(2))
    return logits.requires_grad_(), reference.log_softmax(-1)


def exact_kl(logits: Tensor, reference: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - reference)).sum()


def expected_estimate(estimator: str, logits: Tensor, reference: Tensor) -> Tensor:
    """The expectation of an estimator over tokens from the policy, whose own probabilities have no gradient."""
    logprobs = logits.log_softmax(-1)
    old = logprobs.detach()
    estimate = kl_loss(
        estimator, logprobs[None], reference[None], old[None], torch.ones(1, len(logits), dtype=torch.bool)
    )
    return (old.exp() * estimate[0]).sum()


@pytest.mark.parametrize("estimator", ["k2", "k3_ratio"])
def test_the_gradient_of_a_kl_estimator_is_that_of_the_divergence(estimator: str) -> None:
    logits, reference = distributions()
    (right,) = torch.autograd.grad(exact_kl(logits, reference), logits)
    (ours,) = torch.autograd.grad(expected_estimate(estimator, logits, reference), logits)
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


def test_k1_in_a_loss_has_no_gradient_and_that_of_k3_is_of_the_reverse_divergence() -> None:
    """Why both are refused."""
    logits, reference = distributions()
    logprobs = logits.log_softmax(-1)
    d, drawn = logprobs - reference, logprobs.detach().exp()
    (k1,) = torch.autograd.grad((drawn * d).sum(), logits, retain_graph=True)
    (k3,) = torch.autograd.grad((drawn * ((-d).exp() - 1 + d)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)
    assert k1.abs().max() < 1e-12
    torch.testing.assert_close(k3, reverse, rtol=1e-9, atol=1e-12)
    for estimator in ("k1", "k3"):
        with pytest.raises(
            UserError, match=f"kl_estimator is '{estimator}', whose gradient is .*; allowed: k2, k3_ratio"
        ):
            GRPO(kl_estimator=estimator)  # type: ignore[arg-type]


def test_k1_in_the_reward_has_the_gradient_of_the_divergence() -> None:
    logits, reference = distributions()
    logprobs = logits.log_softmax(-1)
    rollouts = Round(
        torch.ones(13, 1, dtype=torch.bool), torch.zeros(13, 1, dtype=F64), logprobs.detach()[:, None], 1,
        reference=reference[:, None], kl_coef=1.0,
    )  # fmt: skip
    rewards = rollouts.kl_rewards()[:, 0]
    (ours,) = torch.autograd.grad(-(logprobs.detach().exp() * rewards * logprobs).sum(), logits)
    (right,) = torch.autograd.grad(exact_kl(*distributions()[:0] or (logits, reference)), logits)
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3_ratio"])
def test_a_step_on_the_kl_term_alone_lowers_the_divergence(estimator: str) -> None:
    logits, reference = distributions()
    before = float(exact_kl(logits, reference).detach())
    (gradient,) = torch.autograd.grad(expected_estimate(estimator, logits, reference), logits)
    assert float(exact_kl(logits.detach() - 0.1 * gradient, reference)) < before


# Advantages -----------------------------------------------------------------------------------------------------------
ALL = torch.ones(6, dtype=torch.bool)
SCORES = torch.tensor([1.0, 0.0, 4.0, 2.0, 2.0, 2.0], dtype=F64)


def test_group_advantages_are_standard_scores_within_each_group() -> None:
    first, second = SCORES.view(2, 3)
    expected = torch.cat([(first - first.mean()) / (first.std() + 1e-4), 0 * second])
    torch.testing.assert_close(group_advantages(SCORES, ALL, 3, True), expected, rtol=1e-12, atol=1e-12)
    expected = torch.cat([first - first.mean(), 0 * second])
    torch.testing.assert_close(group_advantages(SCORES, ALL, 3, False), expected, rtol=1e-12, atol=1e-12)


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    expected = [1 - 2.0, 0 - 2.5, 4 - 0.5, 0.0, 0.0, 0.0]
    assert leave_one_out(SCORES, ALL, 3).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("advantages", [leave_one_out, lambda *given: group_advantages(*given, True)])
def test_a_group_of_one_and_equal_answers_have_no_advantage(advantages: Callable[..., Tensor]) -> None:
    assert not advantages(SCORES, ALL, 1).any()
    assert not advantages(0 * SCORES + 0.1, ALL, 3).any()


@pytest.mark.parametrize("advantages", [leave_one_out, lambda *given: group_advantages(*given, True)])
def test_an_answer_that_does_not_count_is_left_out_of_its_group(advantages: Callable[..., Tensor]) -> None:
    counted = torch.tensor([True, True, True, False])
    scores = torch.tensor([1.0, 0.0, 4.0, 100.0], dtype=F64)
    found = advantages(scores, counted, 4)
    assert found[3] == 0
    torch.testing.assert_close(found[:3], advantages(scores[:3], counted[:3], 3), rtol=1e-12, atol=1e-12)


def test_gae_is_the_sum_of_discounted_errors_whatever_lies_behind_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 6, generator=generator, dtype=F64) for _ in range(2))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]], dtype=torch.bool)  # the second has two turns
    gamma, lam = 0.9, 0.8
    found = gae(rewards * mask, values, mask, gamma, lam)
    for row in range(2):
        places = [place for place in range(6) if mask[row, place]]
        r, v = [float(rewards[row, t]) for t in places], [float(values[row, t]) for t in places] + [0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for t, place in enumerate(places):
            expected = sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, len(r)))
            assert float(found[row, place]) == pytest.approx(expected, rel=1e-12)
    assert not found[~mask].any()


def test_whitened_advantages_have_mean_0_and_variance_1_and_padding_stays_0() -> None:
    values, mask = torch.randn(4, 9, dtype=F64), torch.rand(4, 9) < 0.6
    white = whiten(values, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white[mask].var()) == pytest.approx(1, rel=1e-6)
    assert not white[~mask].any()
    longer = whiten(
        torch.cat([values, torch.full((4, 5), 7.0, dtype=F64)], 1), torch.cat([mask, mask[:, :5] & False], 1)
    )
    torch.testing.assert_close(longer[:, :9], white, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_baseline", [False, True])
def test_the_advantages_of_reinforce_plus_plus_are_whitened_returns(group_baseline: bool) -> None:
    """Token by token: -0.1 x k1 from there on, discounted, the answer's reward, less the group's mean if that is asked
    for; an answer that is left out, the last, changes nothing."""
    batch, _ = random_batch()
    mask = batch.targets != IGNORED
    mask[-1] = False
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    rewards = torch.where(last, torch.arange(6.0, dtype=F64)[:, None] ** 2, 0.0)
    old, reference = (batch.extras[name] * mask for name in ("old_logprobs", "reference_logprobs"))
    rollouts = Round(mask, rewards, old, 3, reference, kl_coef=0.1)
    objective = ReinforcePlusPlus(gamma=0.9, group_baseline=group_baseline)
    found = objective.estimate(rollouts)["advantages"]
    returns = {}
    for row in range(5):
        group = [float(rewards[other].sum()) for other in range(row // 3 * 3, row // 3 * 3 + 3) if mask[other].any()]
        following = 0.0
        for t in reversed([place for place in range(mask.shape[1]) if mask[row, place]]):
            following = float(rewards[row, t]) - 0.1 * float(old[row, t] - reference[row, t]) + 0.9 * following
            returns[row, t] = following - (sum(group) / len(group) if group_baseline else 0.0)
    values = torch.tensor(list(returns.values()), dtype=F64)
    for place, value in returns.items():
        expected = (value - float(values.mean())) / math.sqrt(float(values.var()) + 1e-8)
        assert float(found[place]) == pytest.approx(expected, rel=1e-12)
    assert not found[~mask].any()


def test_the_value_loss_is_not_changed_by_values_of_padding() -> None:
    batch, scores = random_batch()
    mask = batch.targets != IGNORED
    given = [scores["value"], batch.extras["old_values"], batch.extras["returns"]]
    strange = [torch.where(mask, tensor, math.inf) for tensor in given]
    one, other = (clipped_value_loss(*tensors, mask, 0.2) for tensors in (given, strange))
    assert float(one) == float(other) > 0


def test_the_kl_controller_is_that_of_ziegler() -> None:
    """e = clip(KL / target - 1, -0.2, 0.2); the coefficient is multiplied by 1 + e n / horizon."""
    objective = PPO(kl_coef=0.1, kl_target=4.0, kl_horizon=1000)
    assert objective.next_kl_coef(0.1, 4.4, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert objective.next_kl_coef(0.1, 40.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert objective.next_kl_coef(0.1, 0.0, 100) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert PPO(kl_coef=0.1).next_kl_coef(0.1, 40.0, 100) == 0.1


# Unbiased gradients ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("objective", "exact"),
    [(RLOO(), True), (GRPO(standardise=False), False)],
    ids=["rloo", "grpo"],
)
def test_the_expected_gradient_over_all_groups_is_that_of_the_expected_reward(
    objective: PolicyObjective, exact: bool
) -> None:
    """A policy over 3 answers of one token, groups of 2, all 9 groups enumerated; the mean of a group includes the
    answer itself, so GRPO's gradient is (n - 1) / n of the exact one."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 3.0], dtype=F64)
    probabilities = logits.softmax(-1)
    (right,) = torch.autograd.grad(-(probabilities * rewards).sum(), logits, retain_graph=True)
    found = torch.zeros(3, dtype=F64)
    for one in range(3):
        for two in range(3):
            index = torch.tensor([one, two])
            logprobs = logits.log_softmax(-1)[index][:, None]
            mask = torch.ones(2, 1, dtype=torch.bool)
            rollouts = Round(mask, rewards[index][:, None], logprobs.detach(), 2)
            extras = objective.estimate(rollouts) | {"old_logprobs": logprobs.detach(), "fresh": torch.zeros(2)}
            batch = Batch(
                {"tokens": torch.zeros(2, 1, dtype=torch.int64)}, torch.zeros(2, 1, dtype=torch.int64), extras
            )
            loss = objective(Given(logprobs), batch).total / objective.count(batch)  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            found += (probabilities[one] * probabilities[two]).detach() * gradient
    torch.testing.assert_close(found, right if exact else right / 2, rtol=1e-6, atol=1e-9)
