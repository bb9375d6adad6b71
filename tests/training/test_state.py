"""What a run remembers: every part is saved once and restored, and a broken-off macro-batch continues its sums."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from cleangpt.distributed.processes import Ranks
from cleangpt.objectives import Loss
from cleangpt.training.meter import LossSums, Meter, StepResult
from cleangpt.training.state import Position, TrainState

LOSSES = [0.1, 0.2, 0.3]
REWARDS = [1.0, 2.0, 4.0]
CPU = torch.device("cpu")


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def step(loss: float, count: float = 4.0, grad_norm: float = 1.0, **metrics: float) -> StepResult:
    values = {name: number(value) for name, value in metrics.items()}
    return StepResult(number(loss), values, count, number(grad_norm), number(0.0), samples=8, lr=0.5, weight_decay=0.1)


class Three(Ranks):
    """One of three processes whose losses and rewards are known."""

    def all_gather(self, value: Any) -> list[Any]:
        sums = [{"loss": loss, "reward": reward} for loss, reward in zip(LOSSES, REWARDS, strict=True)]
        assert value == sums[self.rank]
        return sums


def saved(rank: int) -> dict[str, Any]:
    """The state of one of the three processes after a step."""
    meter = Meter(CPU, Three(rank=rank, world_size=3))
    meter.add(step(LOSSES[rank], count=12.0, grad_norm=7.0, reward=REWARDS[rank]))
    return meter.state_dict()


def resumed(state: dict[str, Any], ranks: Ranks) -> Meter:
    meter = Meter(CPU, ranks)
    meter.load_state_dict(state)
    assert (meter.steps, meter.samples, meter.count, meter.grad_norm.item()) == (1, 8, 12.0, 7.0)
    assert (meter.lr, meter.weight_decay) == (0.5, 0.1)
    return meter


# The sums of a macro-batch -------------------------------------------------------------------------------------------


def test_losses_gradient_norms_and_metrics_of_steps_are_added_and_divided_by_what_was_counted() -> None:
    meter = Meter(CPU, Ranks())
    meter.add(step(6.0, count=4.0, grad_norm=1.5, accuracy=2.0))
    meter.add(step(2.0, count=12.0, grad_norm=0.5, accuracy=4.0))
    assert meter.mean_loss() == 0.5
    assert meter.mean_metrics() == {"accuracy": 0.375}
    assert (meter.grad_norm.item(), meter.steps, meter.samples) == (2.0, 2, 16)
    meter.reset()
    assert (meter.mean_metrics(), meter.steps, meter.grad_norm.item()) == ({}, 0, 0.0) and math.isnan(meter.mean_loss())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_of_as_many_processes_continues_with_its_own_sums(rank: int) -> None:
    """Added up by the main one, they would be added in another order than in an unbroken run."""
    meter = resumed(saved(0), Three(rank=rank, world_size=3))
    assert meter.loss.item() == LOSSES[rank]
    assert {name: value.item() for name, value in meter.metrics.items()} == {"reward": REWARDS[rank]}


def test_another_number_of_processes_has_the_same_sums() -> None:
    pair = [resumed(saved(2), Ranks(rank=rank, world_size=2)) for rank in (0, 1)]
    assert [meter.loss.item() for meter in pair] == [math.fsum(LOSSES), 0.0]
    assert [meter.metrics["reward"].item() for meter in pair] == [math.fsum(REWARDS), 0.0]
    alone = resumed(saved(1), Ranks())
    assert (alone.loss.item(), alone.metrics["reward"].item()) == (math.fsum(LOSSES), math.fsum(REWARDS))


def test_a_resumed_macro_batch_takes_further_steps_and_those_of_a_rolled_back_one_are_forgotten() -> None:
    meter = Meter(CPU, Ranks())
    meter.add(step(6.0, accuracy=2.0))
    state = meter.state_dict()
    meter.add(step(100.0, accuracy=50.0, other=1.0))
    meter.load_state_dict(state)
    meter.add(step(2.0, accuracy=1.0))
    assert (meter.mean_loss(), meter.mean_metrics()) == (1.0, {"accuracy": 0.375})


# The losses of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [2.0, math.nan, math.inf])
def test_micro_batches_are_added_and_one_that_is_not_finite_is_not_left_out(last: float) -> None:
    """A sum without it would be divided by a count with it."""
    sums = LossSums(CPU, copies=1)
    for total in (1.0, last):
        sums.add(Loss(torch.tensor(total), {"entropy": torch.tensor(total)}))
    assert sums.total.item() == pytest.approx(1.0 + last, nan_ok=True)
    assert sums.metrics["entropy"].item() == pytest.approx(1.0 + last, nan_ok=True)


@pytest.mark.parametrize("loss", [9.0, math.nan, math.inf])
def test_a_skipped_step_is_in_no_mean_whatever_its_numbers(loss: float) -> None:
    """Finite with an infinite gradient, as where fp16 overflows, or not finite itself."""
    meter = Meter(CPU, Ranks())
    meter.add(step(6.0, count=4.0, grad_norm=1.5, accuracy=2.0))
    skipped = step(loss, count=12.0, grad_norm=math.inf, accuracy=loss)
    meter.add(dataclasses.replace(skipped, skipped=number(2.0)))
    again = Meter(CPU, Ranks())
    again.load_state_dict(meter.state_dict())
    for each in (meter, again):
        assert (each.mean_loss(), each.mean_metrics(), each.mean_grad_norm()) == (1.5, {"accuracy": 0.5}, 1.5)
        assert (each.steps, each.samples) == (2, 16)


def test_processes_that_compute_the_same_loss_each_count_a_share_of_it() -> None:
    parts = [LossSums(CPU, copies=2) for _ in range(2)]
    for part in parts:
        part.add(Loss(torch.tensor(3.0), {"entropy": torch.tensor(1.0)}))
    assert sum(part.total.item() for part in parts) == 3.0
    assert sum(part.metrics["entropy"].item() for part in parts) == 1.0


# Where a run stands --------------------------------------------------------------------------------------------------


def test_a_position_is_restored_and_its_time_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cleangpt.training.state.time.perf_counter", lambda: now[0])
    first = Position(samples=64, step=5, macro_batch=2)
    now[0] = 130.0
    state = first.state_dict()
    assert state == {"samples": 64, "step": 5, "macro_batch": 2, "time_trained": 30.0}
    second = Position()
    second.load_state_dict(state)
    now[0] = 1000.0
    second.start_clock()  # what lies between two processes is no training
    now[0] = 1005.0
    assert second.read_clock() == 35.0
    assert (second.samples, second.step, second.macro_batch) == (64, 5, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("samples", 1.5), ("step", -1), ("macro_batch", 2**63), ("samples", "3"), ("step", True),
     ("time_trained", math.nan), ("time_trained", None)],
)  # fmt: skip
def test_what_is_no_position_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        Position().load_state_dict({name: value})


@pytest.mark.parametrize(("name", "value"), [("steps", 1.5), ("count", -1.0), ("seconds", "long")])
def test_what_is_no_sum_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        Meter(CPU, Ranks()).load_state_dict(Meter(CPU, Ranks()).state_dict() | {name: value})


# Everything ----------------------------------------------------------------------------------------------------------


class Part:
    """A part of a run, with a number to remember."""

    def __init__(self, value: int) -> None:
        self.value, self.asked = value, 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_every_part_is_asked_once_and_all_are_restored() -> None:
    parts = {name: Part(value) for value, name in enumerate(("position", "model", "optimizer", "random"))}
    state = TrainState(parts).state_dict()
    assert state == {name: {"value": part.value} for name, part in parts.items()}
    assert [part.asked for part in parts.values()] == [1] * 4
    others = {name: Part(-1) for name in parts}
    TrainState(others).load_state_dict(state)
    assert {name: part.value for name, part in others.items()} == {name: part.value for name, part in parts.items()}


def test_a_part_left_out_stays_as_it_is() -> None:
    parts = {"position": Part(1), "trackers": Part(2)}
    TrainState(parts).load_state_dict({"position": {"value": 3}, "trackers": {"value": 4}}, without=("trackers",))
    assert (parts["position"].value, parts["trackers"].value) == (3, 2)


def test_only_the_large_parts_are_read_in_place() -> None:
    parts = {name: Part(value) for value, name in enumerate(("position", "model", "optimizer"))}
    assert TrainState(parts).tensors() == {"model": {"value": 1}, "optimizer": {"value": 2}}
