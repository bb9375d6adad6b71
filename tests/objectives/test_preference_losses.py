"""Losses on preferences: their values and gradients by their equations, one pair at a time, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.objectives import DPO, IPO, KTO, OBJECTIVES, ORPO, Objective, RewardModel, SimPO
from cleangpt.objectives.orpo import log_odds
from cleangpt.objectives.step_means import with_step_means
from tests.preferences import Given, answers

LENGTHS = [4, 2, 1, 5, 3, 3, 6, 2]
MEAN_CHOSEN = (4 + 1 + 3 + 6) / 4
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


Row = tuple[float, float, int]
"""Log-probability, the reference's, and length of an answer."""
Formula = Callable[[Row, Row], tuple[float, ...]]
"""Loss of a pair, and its derivatives by both log-probabilities."""


def difference(chosen: Row, rejected: Row, mean: bool = False) -> float:
    (one, its, length), (other, others, other_length) = chosen, rejected
    return (one - its) / (length if mean else 1) - (other - others) / (other_length if mean else 1)


def dpo(beta: float, epsilon: float, robust: bool, mean: bool, sft: float) -> Formula:
    def pair(chosen: Row, rejected: Row) -> tuple[float, ...]:
        z = beta * difference(chosen, rejected, mean)
        if robust:
            loss = (-(1 - epsilon) * log_sigmoid(z) + epsilon * log_sigmoid(-z)) / (1 - 2 * epsilon)
            slope = -beta * ((1 - epsilon) * sigmoid(-z) + epsilon * sigmoid(z)) / (1 - 2 * epsilon)
        else:
            loss = -(1 - epsilon) * log_sigmoid(z) - epsilon * log_sigmoid(-z)
            slope = -beta * ((1 - epsilon) * sigmoid(-z) - epsilon * sigmoid(z))
        lengths = [row[2] if mean else 1 for row in (chosen, rejected)]
        return loss - sft * chosen[0] / MEAN_CHOSEN, slope / lengths[0] - sft / MEAN_CHOSEN, -slope / lengths[1]

    return pair


def ipo(beta: float, mean: bool) -> Formula:
    def pair(chosen: Row, rejected: Row) -> tuple[float, ...]:
        over = difference(chosen, rejected, mean) - 1 / (2 * beta)
        return over**2, 2 * over / (chosen[2] if mean else 1), -2 * over / (rejected[2] if mean else 1)

    return pair


def simpo(beta: float, gamma: float) -> Formula:
    def pair(chosen: Row, rejected: Row) -> tuple[float, ...]:
        z = beta * (chosen[0] / chosen[2] - rejected[0] / rejected[2]) - gamma
        return -log_sigmoid(z), -beta * sigmoid(-z) / chosen[2], beta * sigmoid(-z) / rejected[2]

    return pair


def orpo(weight: float) -> Formula:
    def pair(chosen: Row, rejected: Row) -> tuple[float, ...]:
        (one, _, length), (other, _, other_length) = chosen, rejected
        p, q = math.exp(one / length), math.exp(other / other_length)
        z = math.log(p / (1 - p)) - math.log(q / (1 - q))
        slope = weight * sigmoid(-z)
        return (
            -one / length - weight * log_sigmoid(z), (-1 - slope / (1 - p)) / length, slope / (1 - q) / other_length,
        )  # fmt: skip

    return pair


PAIRED: list[tuple[Objective, Formula]] = [
    (DPO(beta=0.3), dpo(0.3, 0, False, False, 0)),
    (DPO(beta=0.3, label_smoothing=0.2), dpo(0.3, 0.2, False, False, 0)),
    (DPO(beta=0.3, label_smoothing=0.2, robust=True), dpo(0.3, 0.2, True, False, 0)),
    (DPO(beta=5.0, length_normalised=True), dpo(5.0, 0, False, True, 0)),
    (DPO(beta=0.3, sft_weight=0.7), dpo(0.3, 0, False, False, 0.7)),
    (IPO(beta=0.5), ipo(0.5, True)),
    (IPO(beta=0.5, length_normalised=False), ipo(0.5, False)),
    (SimPO(beta=2.0, gamma=0.5), simpo(2.0, 0.5)),
    (ORPO(weight=0.4), orpo(0.4)),
]
EVERY: list[Objective] = [
    *(objective for objective, _ in PAIRED), KTO(beta=0.3, undesirable_weight=1.5), RewardModel(centring=0.1),
]  # fmt: skip


def given() -> tuple[Given, Batch]:
    """Four pairs of answers, or eight labelled ones, with everything that an objective may read."""
    torch.manual_seed(1)
    rows = answers(LENGTHS)
    shape = rows.targets.shape
    model = Given(-torch.rand(shape, dtype=torch.float64) * 2, torch.randn(shape, dtype=torch.float64))
    margin, desirable = torch.rand(len(LENGTHS)), torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])
    rows.extras = {
        "reference_logprobs": -torch.rand(shape, dtype=torch.float64) * 2,
        "margin": margin.repeat_interleave(2)[: len(LENGTHS), None].expand(shape).contiguous(),
        "desirable": desirable[:, None].expand(shape).contiguous(),
    }
    return model, rows


def step(objective: Objective, model: Given, batches: list[Batch]) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Mean loss, its gradient by row, and metrics of a step, as the trainer computes them."""
    count = sum(map(objective.count, batches))
    loss, metrics = torch.zeros((), dtype=torch.float64), dict[str, float]()
    for batch in with_step_means(objective, model, batches, batches, count, lambda total: total):  # type: ignore[arg-type]
        part = objective(model, batch)  # type: ignore[arg-type]
        loss = loss + part.total / max(count, 1)
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.item() / max(count, 1)
    gradients = torch.autograd.grad(loss, [model.logprobs, model.reward], allow_unused=True)
    return loss.detach(), torch.cat([torch.zeros_like(model.logprobs) if g is None else g for g in gradients]), metrics


def summed(model: Given, rows: Batch) -> list[Row]:
    """Each answer's log-probability, the reference's, and its length, by a loop."""
    found = []
    for row in range(len(rows)):
        places = [place for place in range(rows.targets.shape[1]) if rows.targets[row, place] != IGNORED]
        both = (model.logprobs, rows.extras["reference_logprobs"])
        one, its = (math.fsum(values[row, place].item() for place in places) for values in both)
        found.append((one, its, len(places)))
    return found


@pytest.mark.parametrize(("objective", "formula"), PAIRED, ids=lambda value: str(value) if value in EVERY else "")
def test_a_loss_on_pairs_is_its_equation(
    objective: Objective, formula: Callable[[Row, Row], tuple[float, ...]]
) -> None:
    """The mean over pairs, and its derivative by every token of either answer."""
    model, rows = given()
    loss, gradient, _ = step(objective, model, [rows])
    sums = summed(model, rows)
    expected = [formula(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
    torch.testing.assert_close(loss.item(), math.fsum(value for value, *_ in expected) / 4, **CLOSE)
    slopes = torch.tensor([slope for _, *both in expected for slope in both], dtype=torch.float64) / 4
    by_token = torch.where(rows.targets != IGNORED, slopes[:, None], 0.0)
    torch.testing.assert_close(gradient[: len(rows)], by_token, **CLOSE)


def test_kto_is_its_equation() -> None:
    """z₀ is the mean log-ratio of the mismatched answers, and constant for the gradient."""
    model, rows = given()
    with torch.no_grad():
        model.logprobs[1::2] += 0.6  # so that z₀ is above 0
    loss, gradient, metrics = step(KTO(beta=0.3, desirable_weight=0.8, undesirable_weight=1.5), model, [rows])
    ratios = [one - its for one, its, _ in summed(model, rows)]
    z0 = math.fsum(ratios[1::2]) / 4
    assert z0 > 0.1
    total, slopes = 0.0, []
    for ratio, wanted in zip(ratios[::2], (True, False, True, False), strict=True):
        v = sigmoid(0.3 * (ratio - z0 if wanted else z0 - ratio))
        weight = 0.8 if wanted else 1.5
        total += weight * (1 - v)
        slopes.append((-1 if wanted else 1) * weight * 0.3 * v * (1 - v) / 4)
    torch.testing.assert_close(loss.item(), total / 4, rtol=1e-6, atol=1e-7)  # z₀ travels in float32
    by_token = torch.where(rows.targets[::2] != IGNORED, torch.tensor(slopes, dtype=torch.float64)[:, None], 0.0)
    torch.testing.assert_close(gradient[: len(rows) : 2], by_token, rtol=1e-6, atol=1e-8)
    assert not gradient[1 : len(rows) : 2].any()
    assert metrics["kl"] == pytest.approx(z0, rel=1e-6)


def test_the_kl_of_kto_is_not_below_0() -> None:
    model, rows = given()
    with torch.no_grad():
        model.logprobs[1::2] -= 3.0
    loss, _, metrics = step(KTO(beta=0.3), model, [rows])
    without = rows.rows(torch.arange(len(rows)))
    without.extras["reference_logprobs"] = without.extras["reference_logprobs"].clone()
    without.extras["reference_logprobs"][1::2] = model.logprobs.detach()[1::2]  # a KL of exactly 0
    assert metrics["kl"] < -1
    torch.testing.assert_close(loss, step(KTO(beta=0.3), model, [without])[0])


def test_a_reward_model_is_its_equation() -> None:
    model, rows = given()
    loss, gradient, metrics = step(RewardModel(centring=0.1), model, [rows])
    read = [3 + length for length in LENGTHS]  # after the last token of the answer, itself a target one place earlier
    rewards = [model.reward[row, place].item() for row, place in enumerate(read)]
    expected, slopes, right, sure = 0.0, torch.zeros_like(model.reward), 0.0, 0.0
    for row in range(0, 8, 2):
        one, other = rewards[row : row + 2]
        z = one - other - rows.extras["margin"][row, 0].item()
        expected += -log_sigmoid(z) + 0.1 * (one + other) ** 2
        slopes[row, read[row]] = (-sigmoid(-z) + 0.2 * (one + other)) / 4
        slopes[row + 1, read[row + 1]] = (sigmoid(-z) + 0.2 * (one + other)) / 4
        right += one > other
        sure += max(sigmoid(one - other), sigmoid(other - one))
    torch.testing.assert_close(loss.item(), expected / 4, rtol=1e-7, atol=1e-7)  # margins are float32
    torch.testing.assert_close(gradient[len(rows) :], slopes, rtol=1e-6, atol=1e-8)
    assert metrics["accuracy"] == right / 4
    assert metrics["overconfidence"] == pytest.approx((sure - right) / 4)
    assert metrics["mean_reward"] == pytest.approx(sum(rewards) / 8)


# What every one of them promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", EVERY, ids=str)
@pytest.mark.parametrize("parts", [[2, 2, 2, 2], [2, 6], [4, 4]], ids=str)
def test_a_step_is_the_same_however_it_is_split(objective: Objective, parts: list[int]) -> None:
    """Over micro-batches or devices."""
    model, rows = given()
    split, first = [], 0
    for size in parts:
        split.append(rows.rows(slice(first, first + size)))
        first += size
    whole, in_parts = step(objective, model, [rows]), step(objective, model, split)
    torch.testing.assert_close(in_parts[0], whole[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(in_parts[1], whole[1], rtol=1e-9, atol=1e-9)
    assert in_parts[2] == pytest.approx(whole[2], rel=1e-6)


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_padding_and_what_stands_behind_the_mask_change_nothing(objective: Objective) -> None:
    """NaN included, in the data as in what the model would answer there."""
    model, rows = given()
    expected = step(objective, model, [rows])
    counts = rows.targets != IGNORED
    rows.extras["reference_logprobs"] = rows.extras["reference_logprobs"].where(counts, math.nan)
    wider = [torch.nn.functional.pad(tensor, (0, 3), value=value)
             for tensor, value in ((rows.inputs["tokens"], 0), (rows.targets, IGNORED))]  # fmt: skip
    extras = {name: torch.nn.functional.pad(values, (0, 3)) for name, values in rows.extras.items()}
    padded = Given(*(torch.nn.functional.pad(values.detach(), (0, 3)) for values in (model.logprobs, model.reward)))
    loss, gradient, metrics = step(objective, padded, [Batch({"tokens": wider[0]}, wider[1], extras, 2)])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient[:, :-3], expected[1])
    assert metrics == pytest.approx(expected[2])


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_a_pair_without_answers_is_left_out(objective: Objective) -> None:
    """As if it were not in the batch; a batch of such pairs has loss and gradient 0."""
    model, rows = given()
    rows.targets[2:4] = IGNORED
    kept = [row for row in range(len(rows)) if row not in (2, 3)]
    expected = step(objective, model, [rows.rows(torch.tensor(kept))])
    assert objective.count(rows) == 3
    found = step(objective, model, [rows])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[2] == pytest.approx(expected[2])
    rows.targets[:] = IGNORED
    loss, gradient, _ = step(objective, model, [rows])
    assert objective.count(rows) == 0 and loss == 0 and not gradient.any()


@pytest.mark.parametrize("objective", EVERY, ids=str)
@pytest.mark.parametrize("size", [1e-30, 200.0], ids=["certain", "hardly possible"])
@pytest.mark.parametrize("row", [0, 1])
def test_an_extreme_answer_has_a_finite_gradient(objective: Objective, size: float, row: int) -> None:
    """Log-ratios of hundreds of nats, and probabilities of 1."""
    model, rows = given()
    with torch.no_grad():
        model.logprobs[row::2] = -size
        model.reward[row::2] = size
    loss, gradient, _ = step(objective, model, [rows])
    assert loss.isfinite() and gradient.isfinite().all()


def test_a_log_odds_is_finite_for_a_certain_answer_and_exact_elsewhere() -> None:
    assert log_odds(torch.zeros(1)).isfinite().all()
    values = torch.tensor([-1e-3, -0.5, -3.0, -40.0], dtype=torch.float64)
    expected = [value - math.log(-math.expm1(value)) for value in values.tolist()]
    torch.testing.assert_close(log_odds(values), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("objective", [entry for entry in EVERY if "margin" not in entry.reads], ids=str)
def test_an_answer_that_grows_likelier_lowers_the_loss_if_it_is_the_better_one(objective: Objective) -> None:
    model, rows = given()
    rows.extras["desirable"] = torch.ones_like(rows.extras["desirable"])
    _, gradient, _ = step(objective, model, [rows])
    chosen = gradient[: len(rows) : 2][rows.targets[::2] != IGNORED]
    assert (chosen < 0).all() or isinstance(objective, IPO)


def test_what_a_dpo_run_logs() -> None:
    model, rows = given()
    _, _, metrics = step(DPO(beta=0.3), model, [rows])
    ratios = [one - its for one, its, _ in summed(model, rows)]
    margins = [0.3 * (one - other) for one, other in zip(ratios[::2], ratios[1::2], strict=True)]
    assert metrics == pytest.approx({
        "accuracy": sum(margin > 0 for margin in margins) / 4, "margin": math.fsum(margins) / 4,
        "chosen_log_ratio": math.fsum(ratios[::2]) / 4, "rejected_log_ratio": math.fsum(ratios[1::2]) / 4,
    })  # fmt: skip


def test_at_the_reference_dpo_is_log_2_and_right_half_of_the_time() -> None:
    model, rows = given()
    rows.extras["reference_logprobs"] = model.logprobs.detach().clone()
    loss, _, metrics = step(DPO(beta=0.3), model, [rows])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12) and metrics["accuracy"] == 0.5


def test_a_batch_without_what_an_objective_reads_is_an_error() -> None:
    model, rows = given()
    del rows.extras["reference_logprobs"]
    with pytest.raises(KeyError, match="reference_logprobs"):
        step(DPO(), model, [rows])
    assert step(SimPO(), model, [rows])[0].isfinite()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(DPO, "dpo"), (IPO, "ipo"), (KTO, "kto"), (ORPO, "orpo"), (RewardModel, "reward_model"), (SimPO, "simpo")],
)
def test_they_are_registered_by_name(kind: Any, name: str) -> None:
    assert OBJECTIVES[name] is kind
