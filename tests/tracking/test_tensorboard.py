"""TensorBoard's files, read back by TensorBoard's own reader."""

import json

import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleangpt.tracking.tensorboard import TensorBoardTracker


def begin(run, truncate_after=None):
    tracker = TensorBoardTracker({"optimizer": {"lr": 0.001}}, run)
    tracker.open(truncate_after)
    return tracker


def read(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def points(run, name):
    return [(event.step, event.value) for event in read(run).Scalars(name)]


def text(run, tag):
    return [event.tensor_proto.string_val[0].decode("utf-8") for event in read(run).Tensors(f"{tag}/text_summary")]


def test_figures_samples_and_experiment_are_read_back(tmp_path):
    tracker = begin(tmp_path)
    tracker.record({"macro_batch": 1, "val_loss": 2.5, "mfu": None})
    tracker.record({"macro_batch": 2, "val_loss": 2.25, "exact_match": 0.5})
    tracker.sample(2, "one\ntwo 你好")
    tracker.close("finished")
    assert sorted(read(tmp_path).Tags()["scalars"]) == ["exact_match", "val_loss"]
    assert points(tmp_path, "val_loss") == [(1, 2.5), (2, 2.25)]
    assert text(tmp_path, "sample") == ["    one\n    two 你好\n"]
    assert json.loads(text(tmp_path, "experiment")[0]) == {"optimizer": {"lr": 0.001}}


def test_figures_are_there_before_the_run_ends(tmp_path):
    tracker = begin(tmp_path)
    tracker.record({"macro_batch": 1, "val_loss": 2.5})
    assert points(tmp_path, "val_loss") == [(1, 2.5)]
    tracker.close("finished")


@pytest.mark.parametrize(("truncate_after", "kept"), [(2, [1, 2]), (1, [1]), (None, [])])
def test_a_resumed_run_takes_back_what_it_does_again(tmp_path, truncate_after, kept):
    first = begin(tmp_path)
    for macro_batch in (1, 2, 3):
        first.record({"macro_batch": macro_batch, "val_loss": float(macro_batch)})
    first.close("interrupted")
    second = begin(tmp_path, truncate_after)
    second.record({"macro_batch": 3, "val_loss": 30.0})
    second.close("finished")
    assert points(tmp_path, "val_loss") == [*((step, float(step)) for step in kept), (3, 30.0)]
