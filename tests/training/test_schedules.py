"""Schedules are shapes over progress; steps never cross the end of a macro-batch."""

import math
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cleangpt.config import Schedule, ScheduleConfig
from cleangpt.experiment import Experiment, samples_per_macro_batch, total_samples
from cleangpt.training.resolve import curves
from cleangpt.training.schedules import accumulation, factor

shares = st.floats(0, 1)
schedules = st.builds(
    Schedule,
    shape=st.sampled_from(["constant", "linear", "cosine", "power", "wsd"]),
    initial=st.floats(0, 10),
    final=st.floats(0, 10),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    power=st.floats(0.1, 5),
)


@given(schedule=schedules, progress=shares)
def test_the_factor_stays_between_its_ends(schedule: Schedule, progress: float) -> None:
    low = 0 if progress < schedule.warmup else min(schedule.initial, schedule.final)
    value = factor(schedule, progress)
    assert low - 1e-9 <= value <= max(schedule.initial, schedule.final) + 1e-9


@given(schedule=schedules)
def test_every_shape_but_constant_goes_from_initial_to_final(schedule: Schedule) -> None:
    assert math.isclose(factor(schedule, schedule.warmup), schedule.initial, abs_tol=1e-9)
    end = schedule.initial if schedule.shape == "constant" else schedule.final
    if schedule.shape != "wsd" or schedule.decay > 0:
        assert math.isclose(factor(schedule, 1.0), end, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("shape", "at_quarter", "at_half"),
    [
        ("constant", 1, 1),
        ("linear", 1 - 0.9 * 0.25, 0.55),
        ("cosine", 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55),
        ("power", 0.1 + 0.9 * 0.75**3, 0.1 + 0.9 / 8),
        ("wsd", 1, 0.1 + 0.9 * 0.5 / 0.8),
    ],
)
def test_shapes_have_their_closed_form(shape: str, at_quarter: float, at_half: float) -> None:
    schedule = Schedule(shape=shape, final=0.1, power=3, decay=0.8 if shape == "wsd" else 0.2)
    if shape != "wsd":
        assert math.isclose(factor(schedule, 0.25), at_quarter)
    else:
        assert factor(schedule, 0.2) == pytest.approx(at_quarter)
    assert math.isclose(factor(schedule, 0.5), at_half)


def test_the_warm_up_is_linear_and_counts_the_step_to_be_made() -> None:
    schedule = Schedule(warmup=0.1)
    assert [round(factor(schedule, step / 100, 1 / 100), 6) for step in range(11)] == [
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0,
    ]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.integers(1, 60),
    base=st.integers(1, 60),
    initial=st.floats(0.01, 1),
    shape=st.sampled_from(["constant", "linear", "cosine", "power", "wsd"]),
)
def test_macro_batches_end_on_a_step_and_no_step_is_much_smaller_than_its_neighbours(
    tiny: Callable[..., Experiment], batches: int, base: int, initial: float, shape: str
) -> None:
    experiment = tiny(
        training__batches_per_macro_batch=batches,
        training__accumulation=min(base, batches),
        schedule=ScheduleConfig(batch_size=Schedule(shape=shape, initial=initial)),
    )
    samples, planned = curves(experiment)
    sizes = [size // 8 for size in planned["training_batch_size"]]
    ends = {start + size * 8 for start, size in zip(samples, sizes, strict=True)}
    per_macro_batch = samples_per_macro_batch(experiment)
    assert {n * per_macro_batch for n in range(1, 7)} <= ends
    assert max(ends) == total_samples(experiment)
    assert max(sizes) <= experiment.training.accumulation
    if shape == "constant" and initial == 1:
        assert max(sizes) - min(sizes) <= 1


def test_the_training_batch_size_grows_and_takes_the_learning_rate_along(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(
        training__batches_per_macro_batch=64,
        training__accumulation=8,
        schedule=ScheduleConfig(
            lr=Schedule(shape="linear", final=0), batch_size=Schedule(shape="linear", initial=0.125, final=1)
        ),
    )
    samples, planned = curves(experiment)
    sizes = planned["training_batch_size"]
    for seen, size in zip(samples, sizes, strict=True):
        scheduled = round(8 * (0.125 + 0.875 * seen / total_samples(experiment)))
        assert scheduled / 2 <= size / 8 <= scheduled
    assert sizes[0] == 8 and max(sizes[-8:]) >= 56
    for seen, rate in zip(samples, planned["lr"], strict=True):
        assert math.isclose(rate, 1e-2 * (1 - seen / total_samples(experiment)))


def test_uneven_accumulation_is_shared_out(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(training__batches_per_macro_batch=10, training__accumulation=4)
    position, sizes = 0, []
    while position < 80:
        sizes.append(accumulation(experiment, position))
        position += sizes[-1] * 8
    assert sizes == [4, 3, 3]
