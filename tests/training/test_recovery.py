"""Numbers gone wrong: bad snapshots never take the place of good ones, and a spike of the loss is gone back from."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.config import TrainingConfig
from cleangpt.data.batch import Batch
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import RunFailedError
from cleangpt.experiment import Experiment
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.meter import StepResult
from cleangpt.training.recovery import SpikeDetector, first_not_finite
from cleangpt.training.trainer import Trainer
from tests.losses import scaled

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]


# Finding a spike -------------------------------------------------------------------------------------------------


def watch(**fields: Any) -> SpikeDetector:
    fields = {"spike_threshold": 1.0, "spike_window": 3, "max_skipped_steps": 2} | fields
    return SpikeDetector(TrainingConfig(macro_batches=1, batches_per_macro_batch=1, **fields), Ranks())


def result(loss: float) -> StepResult:
    """A step over four targets of this loss each; one that is not finite was skipped, and is kept out of the sum."""
    finite = math.isfinite(loss)
    return StepResult(
        torch.tensor(4 * loss if finite else 0.0), {}, 4.0, torch.zeros(()), torch.tensor(0.0 if finite else 1.0),
        samples=8, lr=0.1, weight_decay=0.0,
    )  # fmt: skip


def found(spikes: SpikeDetector, losses: list[float], read_every: int = 1) -> int | None:
    for step, loss in enumerate(losses, start=1):
        spikes.observe(step, result(loss))
        if step % read_every == 0:
            spikes.detect()
    return spikes.detect()


@pytest.mark.parametrize("read_every", [1, 2, 100])
@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3, 3, 3, 3.9, 3.9, 3], None),
        ([3, 3, 3, 4.1, 3], 4),
        ([3, 9, 3, 3, 3], None),
        ([1, 1, 4, 2.9, 3.6, 3.8], None),
        ([3, 3, 3, math.nan, 3, math.nan, 3], None),
        ([3, 3, 3, math.nan, math.nan, 9], 5),
        ([3, 3, 3, math.nan, 4.1], 5),
    ],
)
def test_a_spike_is_a_loss_above_the_mean_of_a_full_window_or_too_many_skipped_steps(
    losses: list[float], step: int | None, read_every: int
) -> None:
    """However often the losses are read."""
    assert found(watch(), losses, read_every) == step


def test_the_watch_goes_on_where_it_was_left() -> None:
    first, second = watch(), watch()
    assert found(first, [3, 3, math.nan]) is None
    second.load_state_dict(first.state_dict())
    assert found(second, [math.nan]) == 1
    third = watch()
    third.load_state_dict(first.state_dict())
    assert found(third, [3, 4.5]) == 2


def test_what_is_not_finite_is_named() -> None:
    good = {"a": torch.ones(3), "b": torch.tensor([1, 2]), "c": torch.full((2,), 3e38), "d": torch.zeros(0)}
    assert first_not_finite(good) == ""
    for value in (math.nan, math.inf, -math.inf):
        assert first_not_finite(good | {"e": torch.tensor([0.0, value])}) == "e"
    assert first_not_finite({}) == ""


# Poisoned weights ------------------------------------------------------------------------------------------------


def spoil_after(trainer: Trainer, step: int, what: str) -> None:
    original = trainer.step

    def spoilt() -> None:
        original()
        if trainer.position.step == step:
            parameter = trainer.model.final_norm.weight
            target = parameter.data if what == "weight" else trainer.optimizer.adamw.state[parameter]["exp_avg"]
            target[3] = math.nan

    trainer.step = spoilt  # type: ignore[method-assign]


@pytest.mark.default(1)
@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_poisoned_weights_never_push_out_good_snapshots(
    tiny: Build, trainer: Open, what: str, asynchronous: bool
) -> None:
    """Two snapshots are kept, and the run may skip more steps than are in two macro-batches."""
    fields = {"training__max_skipped_steps": 100, "saving__async_snapshots": asynchronous}
    run = trainer(tiny(run_dir="run", **fields))
    spoil_after(run, 9, what)
    with pytest.raises(
        RunFailedError, match=r"final_norm.weight is not finite after step \d+; the last good snapshot is"
    ):
        run.train()
    assert [path.name for path in list_snapshots(Path("run/snapshots"))] == ["mb000002", "mb000001"]
    trainer(tiny(run_dir="unbroken", **fields)).train()
    trainer(tiny(run_dir="run", **fields)).train()
    one, two = (load_snapshot(list_snapshots(Path(name) / "snapshots")[0])["model"] for name in ("run", "unbroken"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_poisoned_weights_are_not_saved_at_a_signal_or_as_a_checkpoint(tiny: Build, trainer: Open) -> None:
    run = trainer(tiny(run_dir="run", saving__checkpoint_every=1, training__max_skipped_steps=100))
    spoil_after(run, 2, "weight")
    with pytest.raises(RunFailedError, match="is not finite after step 4; there is no snapshot yet"):
        run.train()
    assert not list(Path("run").glob("checkpoints/val*"))
    other = trainer(tiny(run_dir="other", training__max_skipped_steps=100))
    spoil_after(other, 2, "weight")
    step = other.step
    other.step = lambda: (step(), signal.raise_signal(signal.SIGTERM))[0]  # type: ignore[method-assign]
    other.train()
    assert other.position.step == 1
    resumed = trainer(tiny(run_dir="other", training__max_skipped_steps=100))
    spoil_after(resumed, 2, "weight")
    after = resumed.step
    resumed.step = lambda: (after(), signal.raise_signal(signal.SIGTERM))[0]  # type: ignore[method-assign]
    with pytest.raises(RunFailedError, match="is not finite after step 2"):
        resumed.train()
    assert [path.name for path in list_snapshots(Path("other/snapshots"))] == ["mb000000_b00001"]


@pytest.mark.default(2)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 5])
def test_a_gradient_that_is_not_finite_skips_the_step_alone(
    tiny: Build, trainer: Open, value: float, step: int
) -> None:
    """The weights are those before it, and the run ends as one whose optimizer has passed over this step."""
    run = trainer(tiny(run_dir="run", training__macro_batches=2))
    update = run.optimizer.step

    def spoilt(lr: float, weight_decay: float) -> torch.Tensor:
        if run.position.step == step:
            assert run.optimizer.parameters[1].grad is not None
            run.optimizer.parameters[1].grad.view(-1)[0] = value
        return update(lr, weight_decay)

    run.optimizer.step = spoilt  # type: ignore[method-assign]
    run.train()
    other = trainer(tiny(run_dir="other", training__macro_batches=2))
    plain = other.optimizer.step

    def passed_over(lr: float, weight_decay: float) -> torch.Tensor:
        if other.position.step != step:
            return plain(lr, weight_decay)
        other.optimizer.adamw.zero_grad(set_to_none=True)
        return torch.zeros(())

    other.optimizer.step = passed_over  # type: ignore[method-assign]
    other.train()
    one, two = run.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert read_metrics(Path("run"))[-1]["skipped_steps"] == 1


# Going back ------------------------------------------------------------------------------------------------------

SPIKES = {
    "training__spike_threshold": 0.5, "training__spike_window": 4, "training__spike_skip": 3,
    "saving__keep_snapshots": 4,
}  # fmt: skip
BAD = range(112, 128)
"""Samples of the data that make the loss jump: the 15th and the 16th batch."""


def with_bad_data(trainer: Trainer) -> Trainer:
    """Makes the targets of some samples a token that never follows."""
    stream: Any = trainer.source.stream  # type: ignore[attr-defined]
    read = stream.batch

    def batch(start: int, count: int) -> Batch:
        read_batch = read(start, count)
        for row in range(count):
            if start + row in BAD:
                read_batch.targets[row].fill_(12)
        return read_batch

    stream.batch = batch
    return trainer


def state_of(run: str) -> dict[str, Any]:
    state = load_snapshot(list_snapshots(Path(run) / "snapshots")[0])
    del state["position"]["time_trained"], state["meter"]
    return state


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for index in range(len(one)):
            assert_same(one[index], two[index])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.fixture
def reference(tiny: Build, trainer: Open) -> dict[str, Any]:
    """The end of a run that meets the bad data, and goes back from it twice."""
    with_bad_data(trainer(tiny(run_dir="reference", **SPIKES))).train()
    return state_of("reference")


def test_a_run_goes_back_from_a_spike_and_ends_like_one_that_never_saw_its_samples(
    tiny: Build, trainer: Open, reference: dict[str, Any]
) -> None:
    """Goes back to macro-batch 3 and leaves out 3 batches; meets the second bad one; goes back to macro-batch 2."""
    assert reference["source"]["skipped_ranges"] == [[80, 128]]
    assert reference["position"]["samples"] == 192 and reference["spikes"]["rollbacks"] == 2
    log = Path("reference/log.txt").read_text()
    lines = [line for line in log.splitlines() if "the loss has spiked" in line]
    skipped = ["24 samples are skipped from now on", "24 samples are skipped from now on"]
    assert [line.partition("spiked; ")[2] for line in lines] == skipped
    lines = read_metrics(Path("reference"))
    assert [line["macro_batch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples_left_out"] for line in lines] == [0, 0, 48, 48, 48, 48]
    assert [line["samples"] for line in lines] == [32, 64, 96, 128, 160, 192]
    assert lines[-1]["rollbacks"] == 2
    never = trainer(tiny(run_dir="never", **SPIKES))
    never.source.skip(80, 128)
    never.train()
    theirs = state_of("never")
    for part in ("model", "optimizer", "random", "position", "source"):
        assert_same(reference[part], theirs[part])
    untimed = ("val_loss", "train_loss", "visited_share", "times_visited", "lr", "grad_norm")
    for one, two in zip(lines[2:], read_metrics(Path("never"))[2:], strict=True):
        assert {name: one[name] for name in untimed} == {name: two[name] for name in untimed}


TRIED = (1, 8, 13, 16, 17, 18, 19, 25, 33)
"""Of the 33 steps, those tried in CI: the first, the last, those around the spike, and some far from it."""


@pytest.mark.default(1)
@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(calls, marks=[] if calls == 18 else pytest.mark.slow if calls in TRIED else pytest.mark.torture)
        for calls in range(1, 34)
    ],
)
def test_a_run_that_is_broken_off_anywhere_around_a_spike_ends_the_same(
    tiny: Build, trainer: Open, reference: dict[str, Any], calls: int
) -> None:
    """After any of the steps that it makes, those that are gone back from included: by a signal, then by a crash."""
    for name, harm in (("signal", lambda: signal.raise_signal(signal.SIGTERM)), ("crash", lambda: 1 / 0)):
        run = with_bad_data(trainer(tiny(run_dir=name, **SPIKES)))
        step, made = run.step, 0

        def then(step: Callable[[], None] = step, harm: Callable[[], Any] = harm) -> None:
            nonlocal made
            step()
            made += 1
            if made == calls:
                harm()

        run.step = then  # type: ignore[method-assign]
        try:
            run.train()
        except ZeroDivisionError:
            assert name == "crash"
        with_bad_data(trainer(tiny(run_dir=name, **SPIKES))).train()
        assert_same(reference, state_of(name))
        assert [line["macro_batch"] for line in read_metrics(Path(name))] == [1, 2, 3, 4, 5, 6]


def test_the_costs_of_spikes_are_shown_where_they_are_watched_for(tiny: Build, trainer: Open) -> None:
    run, other = trainer(tiny(run_dir="run", **SPIKES)), trainer(tiny(run_dir="other"))
    for each in (run, other):
        each.source.skip(8, 24)
        each.source.skip(40, 48)  # of what is left: 56 to 64 of the data
        each.spikes.rollbacks = 2
    assert run.recovery.metrics() == {"rollbacks": 2, "samples_left_out": 24}
    assert other.recovery.metrics() == {}


@pytest.mark.slow
def test_skipped_steps_and_poisoned_weights_are_gone_back_from_too(tiny: Build, trainer: Open) -> None:
    fields = SPIKES | {"training__max_skipped_steps": 2}
    run = trainer(tiny(run_dir="run", **fields))
    bad, first_time = (17, 18), lambda: run.spikes.rollbacks == 0
    run.objective = scaled(run.objective, lambda: math.nan if run.position.step in bad and first_time() else 1.0)
    assert run.train() == "finished"
    assert run.spikes.rollbacks == 1 and run.source.state_dict()["skipped_ranges"] == [[128, 152]]
    other = trainer(tiny(run_dir="other", **SPIKES))
    spoil_after(other, 17, "weight")
    step = other.step
    other.step = lambda: step() if other.spikes.rollbacks == 0 else Trainer.step(other)  # type: ignore[method-assign]
    assert other.train() == "finished"
    assert other.spikes.rollbacks == 1


@pytest.mark.slow
def test_a_run_that_spikes_again_and_again_ends_and_says_so(tiny: Build, trainer: Open) -> None:
    run = with_bad_data(trainer(tiny(run_dir="run", **SPIKES, training__max_rollbacks=1)))
    with pytest.raises(RunFailedError, match=r"the loss has spiked before step \d+, and training.max_rollbacks is 1"):
        run.train()


@pytest.mark.slow
def test_a_spike_is_let_pass_where_no_threshold_is_given(tiny: Build, trainer: Open) -> None:
    run = with_bad_data(trainer(tiny(run_dir="run")))
    assert run.train() == "finished"
    assert run.source.state_dict()["skipped_ranges"] == [] and "rollbacks" not in read_metrics(Path("run"))[-1]
