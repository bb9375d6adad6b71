"""TensorBoard's files, read back by TensorBoard's own reader."""

import json
import time

import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleangpt.tracking.tensorboard import TensorBoardTracker


def wait_for_next_second():
    """Readers order event files by the second in their names, in which real sessions differ."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def begin(run, truncate_after=None, last_step=None, state=None):
    tracker = TensorBoardTracker({"optimizer": {"lr": 0.001}}, run)
    tracker.load_state_dict(state or {})
    tracker.open(truncate_after, last_step)
    return tracker


def row(step, loss):
    return {"step": step, "tokens": 100 * step, "loss": loss}


def read(run, folder="tensorboard"):
    events = EventAccumulator(str(run / folder))
    events.Reload()
    return events


def points(run, name, folder="tensorboard"):
    return [(event.step, event.value) for event in read(run, folder).Scalars(name)]


def text(run, tag):
    return [event.tensor_proto.string_val[0].decode("utf-8") for event in read(run).Tensors(f"{tag}/text_summary")]


def test_metrics_samples_and_experiment_are_read_back(tmp_path):
    tracker = begin(tmp_path)
    tracker.log_steps([row(1, 3.0), row(2, 2.75), row(3, 2.5)])
    tracker.record({"macro_batch": 1, "step": 3, "tokens": 300, "val_loss": 2.5, "mfu": None})
    tracker.record({"macro_batch": 2, "step": 6, "tokens": 600, "val_loss": 2.25, "exact_match": 0.5})
    tracker.sample(2, "one\ntwo 你好")
    tracker.close("finished")
    assert sorted(read(tmp_path).Tags()["scalars"]) == ["macro_batch", "tasks/exact_match", "train/loss", "val/loss"]
    assert points(tmp_path, "train/loss") == [(1, 3.0), (2, 2.75), (3, 2.5)]
    assert points(tmp_path, "val/loss") == [(3, 2.5), (6, 2.25)]
    assert points(tmp_path, "macro_batch") == [(3, 1), (6, 2)]
    assert text(tmp_path, "sample") == ["    one\n    two 你好\n"]
    assert json.loads(text(tmp_path, "experiment")[0]) == {"optimizer": {"lr": 0.001}}


def test_losses_are_there_over_tokens_too(tmp_path):
    tracker = begin(tmp_path)
    tracker.log_steps([{**row(1, 3.0), "lr": 0.1}, {**row(2, 2.75), "lr": 0.1}])
    tracker.record({"macro_batch": 1, "step": 2, "tokens": 200, "val_loss": 2.5, "val_loss/code": 2.25, "mfu": 0.5})
    tracker.close("finished")
    folder = "tensorboard/by_tokens"
    tags = ["by_tokens/train/loss", "by_tokens/val/loss", "by_tokens/val/loss/code"]
    assert sorted(read(tmp_path, folder).Tags()["scalars"]) == tags
    assert points(tmp_path, "by_tokens/train/loss", folder) == [(100, 3.0), (200, 2.75)]


def test_metrics_are_there_before_the_run_ends(tmp_path):
    tracker = begin(tmp_path)
    tracker.log_steps([row(1, 2.5)])
    assert points(tmp_path, "train/loss") == [(1, 2.5)]
    tracker.close("finished")


@pytest.mark.default(1)
@pytest.mark.parametrize(("last_step", "kept"), [(2, [1, 2]), (1, [1]), (None, [])])
def test_a_resumed_run_removes_what_it_does_again(tmp_path, last_step, kept):
    first = begin(tmp_path)
    state = None
    for step in (1, 2, 3):
        first.log_steps([row(step, float(step))])
        state = first.state_dict() if step == last_step else state
    first.close("interrupted")
    wait_for_next_second()
    second = begin(tmp_path, last_step and 0, last_step, state)
    second.log_steps([row(3, 30.0)])
    second.close("finished")
    assert points(tmp_path, "train/loss") == [*((step, float(step)) for step in kept), (3, 30.0)]
    over_tokens = points(tmp_path, "by_tokens/train/loss", "tensorboard/by_tokens")
    assert over_tokens == [*((100 * step, float(step)) for step in kept), (300, 30.0)]


def test_a_roll_back_removes_what_follows_the_snapshot(tmp_path):
    tracker = begin(tmp_path)
    tracker.log_steps([row(1, 1.0), row(2, 2.0)])
    state = tracker.state_dict()
    tracker.log_steps([row(3, 100.0), row(4, 200.0)])
    wait_for_next_second()
    tracker.load_state_dict(state)
    tracker.open(0, 2)
    tracker.log_steps([row(3, 3.0)])
    tracker.close("finished")
    assert points(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert points(tmp_path, "by_tokens/train/loss", "tensorboard/by_tokens") == [(100, 1.0), (200, 2.0), (300, 3.0)]
