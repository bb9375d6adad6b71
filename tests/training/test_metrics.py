"""Points of the steps: those of the training that was done, every one once, read from the device together."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.distributed.processes import Ranks
from cleangpt.experiment import Experiment
from cleangpt.tracking import Trackers
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.meter import StepResult
from cleangpt.training.metrics import FLUSH, StepLog, Throughput
from cleangpt.training.state import Position
from cleangpt.training.trainer import Trainer

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]


class Points(Trackers):
    """Keeps the points of the steps, in the batches in which they come."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, Any]]] = []

    def log_steps(self, rows: list[dict[str, Any]]) -> None:
        self.batches.append(rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for batch in self.batches for row in batch]


def result(loss: float, count: float = 4.0, skipped: bool = False, **metrics: float) -> StepResult:
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    return StepResult(
        torch.tensor(loss), values, count, torch.tensor(0.5), torch.tensor(float(skipped)), samples=8, lr=0.1,
        weight_decay=0.2,
    )  # fmt: skip


def steps(log: StepLog, count: int, first: int = 1) -> None:
    for step in range(first, first + count):
        log.add(Position(samples=8 * step, step=step), result(4.0 * step))


def test_a_point_has_the_numbers_of_its_step_per_counted_thing() -> None:
    points = Points()
    log = StepLog(1, 16, points, Ranks())
    log.add(Position(samples=8, step=1), result(6.0, count=4.0, reward=2.0))
    log.add(Position(samples=16, step=2), result(0.0, count=0.0, skipped=True))
    assert points.rows == [], "read when it is flushed"
    log.flush()
    first, second = ({name: value for name, value in row.items() if name != "tokens_per_second"} for row in points.rows)
    assert first == {
        "step": 1, "samples": 8, "tokens": 128, "lr": 0.1, "weight_decay": 0.2, "batch_size": 8, "loss": 1.5,
        "reward": 0.5, "grad_norm": 0.5, "skipped": 0,
    }  # fmt: skip
    assert (second["step"], second["skipped"]) == (2, 1) and math.isnan(second["loss"]) and math.isnan(second["reward"])


def test_losses_are_summed_over_processes_and_gradient_norms_are_not() -> None:
    class Two(Ranks):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, value]

    points = Points()
    log = StepLog(1, 16, points, Two(world_size=2))
    log.add(Position(samples=8, step=1), result(6.0, count=4.0, reward=2.0, ratio_max=1.5))
    log.flush()
    (row,) = points.rows
    assert (row["loss"], row["reward"], row["grad_norm"]) == (3.0, 1.0, 0.5)
    assert row["ratio_max"] == 1.5, "a maximum is neither summed nor divided"


def test_one_step_in_so_many_is_a_point_whatever_step_the_run_begins_at() -> None:
    points = Points()
    log = StepLog(3, 16, points, Ranks())
    steps(log, 5, first=5)
    log.flush()
    assert [row["step"] for row in points.rows] == [6, 9]


def test_points_are_read_together_and_none_twice() -> None:
    points = Points()
    log = StepLog(1, 16, points, Ranks())
    steps(log, FLUSH - 1)
    assert points.batches == []
    steps(log, 2, first=FLUSH)
    assert [len(batch) for batch in points.batches] == [FLUSH]
    log.flush()
    log.flush()
    assert [row["step"] for row in points.rows] == list(range(1, FLUSH + 2))
    assert len(points.batches) == 2


def test_the_speed_is_that_since_the_last_point_without_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cleangpt.training.metrics.time.perf_counter", lambda: now[0])
    points = Points()
    log = StepLog(2, 16, points, Ranks())
    for step, clock in enumerate((1.0, 2.0, 6.0, 6.0), start=1):
        now[0] = clock
        if step == 3:
            log.restart_clock()  # four seconds of validation
        if step == 4:
            now[0] = 8.0
        log.add(Position(samples=8 * step, step=step), result(1.0))
    log.flush()
    assert [row["tokens_per_second"] for row in points.rows] == [2 * 8 * 16 / 2.0, 2 * 8 * 16 / 2.0]


def test_throughput_is_over_all_devices_and_mfu_is_of_their_peak() -> None:
    known = Throughput(seq_len=16, flops_per_token=100, peak_flops=1e4, devices=2)
    assert known.metrics(50, 4.0) == {"tokens_per_second": 200.0, "mfu": 200 * 100 / 2e4}
    assert Throughput(16, 100, None, 2).metrics(50, 4.0)["mfu"] is None


def watch(trainer: Trainer) -> Points:
    """What a run tells of its steps, with a point of each."""
    points = Points()
    trainer.recorder.step_log = StepLog(1, trainer.recorder.throughput.seq_len, points, Ranks())
    return points


def test_the_points_of_a_run_are_its_steps_and_a_macro_batch_their_mean(tiny: Build, trainer: Open) -> None:
    """Against the metrics of macro-batches of four steps of as many targets each."""
    run = trainer(tiny(run_dir="run"))
    points = watch(run)
    run.train()
    assert [row["step"] for row in points.rows] == list(range(1, 25))
    assert [row["samples"] for row in points.rows] == list(range(8, 200, 8))
    for row, line in zip(points.rows[3::4], read_metrics(Path("run")), strict=True):
        four = points.rows[row["step"] - 4 : row["step"]]
        assert row["lr"] == line["lr"] and row["weight_decay"] == line["weight_decay"]
        assert math.fsum(each["grad_norm"] for each in four) / 4 == pytest.approx(line["grad_norm"], rel=1e-6)
        assert math.fsum(each["loss"] for each in four) / 4 == pytest.approx(line["train_loss"], rel=1e-6)


@pytest.mark.slow
def test_no_point_is_lost_or_told_twice_over_a_signal_and_a_resume(tiny: Build, trainer: Open) -> None:
    unbroken = trainer(tiny(run_dir="unbroken"))
    expected = watch(unbroken)
    unbroken.train()
    broken = trainer(tiny(run_dir="broken"))
    before = watch(broken)
    step = broken.step

    def then() -> None:
        step()
        if broken.position.step in (6, 10):
            signal.raise_signal(signal.SIGUSR1 if broken.position.step == 6 else signal.SIGTERM)

    broken.step = then  # type: ignore[method-assign]
    assert broken.train() == "interrupted"
    assert [row["step"] for row in before.rows] == list(range(1, 11))
    resumed = trainer(tiny(run_dir="broken"))
    after = watch(resumed)
    resumed.train()
    untimed = [
        [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
        for rows in (expected.rows, before.rows + after.rows)
    ]
    assert untimed[0] == untimed[1]
