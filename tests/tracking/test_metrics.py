"""The metrics files: strict JSON, nothing lost, nothing kept of abandoned steps."""

import contextlib
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cleangpt.errors import UserError
from cleangpt.tracking.metrics import (
    METRICS,
    STEP_METRICS,
    MetricsFiles,
    is_objective_metric,
    metric,
    read_metrics,
    read_samples,
    read_steps,
    scores,
    show,
    step_tag,
    tag,
)
from cleangpt.tracking.numbers import show_bytes, show_count, show_time

try:
    import resource
except ImportError:  # Windows
    resource = None

EVERY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
VALUES = st.none() | st.integers(-(2**60), 2**60) | st.floats()
ROWS = st.lists(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "not_finite"), VALUES), max_size=5)


def new(run, truncate_after=None, last_step=None):
    files = MetricsFiles(run)
    files.open(truncate_after, last_step)
    return files


def same(left, right):
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


@EVERY
@given(ROWS)
def test_what_is_recorded_is_read_back_with_nan_and_infinity(tmp_path, rows):
    rows = [{name.encode("utf-8", "replace").decode(): value for name, value in row.items()} for row in rows]
    files = new(tmp_path)
    for row in rows:
        files.record(row)
    back = read_metrics(tmp_path)
    assert [list(row) for row in back] == [list(row) for row in rows]
    assert all(same(a[name], b[name]) for a, b in zip(rows, back, strict=True) for name in a)


def test_every_line_is_strict_json_and_says_what_was_not_finite(tmp_path):
    new(tmp_path).record({"macro_batch": 1, "val_loss": math.nan, "train_loss": -math.inf, "mfu": None})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "macro_batch": 1,
        "val_loss": None,
        "train_loss": None,
        "mfu": None,
        "not_finite": {"val_loss": "nan", "train_loss": "-inf"},
    }


@EVERY
@given(st.lists(st.text(), max_size=4))
def test_any_text_is_one_line_of_samples(tmp_path, texts):
    files = new(tmp_path)
    for macro_batch, text in enumerate([*texts, "a\u2028b\nc\x00\r\n"]):
        files.sample(macro_batch, text)
    assert [entry["text"] for entry in read_samples(tmp_path)] == [*texts, "a\u2028b\nc\x00\r\n"]


def test_a_lone_surrogate_does_not_stop_the_run(tmp_path):
    new(tmp_path).sample(1, "a\ud800b")
    assert read_samples(tmp_path) == [{"macro_batch": 1, "text": "a?b"}]


@EVERY
@given(last=st.integers(0, 6), truncate_after=st.none() | st.integers(0, 8), torn=st.binary(max_size=9))
def test_resuming_keeps_exactly_the_lines_up_to_the_snapshot(tmp_path, last, truncate_after, torn):
    files = new(tmp_path)
    for macro_batch in range(1, last + 1):
        files.log_steps([{"step": 2 * macro_batch - 1}, {"step": 2 * macro_batch}])
        files.record({"macro_batch": macro_batch, "val_loss": 1 / macro_batch})
        files.sample(macro_batch, "text")
    for name in ("metrics.jsonl", "steps.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn.replace(b"\n", b""))
    last_step = truncate_after and 2 * truncate_after - 1
    resumed = new(tmp_path, truncate_after, last_step)
    assert [row["step"] for row in read_steps(tmp_path)] == list(range(1, min(2 * last, last_step or 0) + 1))
    kept = list(range(1, min(last, truncate_after or 0) + 1))
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == kept
    assert [entry["macro_batch"] for entry in read_samples(tmp_path)] == kept
    resumed.record({"macro_batch": 99})
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [*kept, 99]


def test_a_torn_last_line_is_passed_over_by_the_reader(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"macro_batch": 1}\n{"macro_ba')
    assert read_metrics(tmp_path) == [{"macro_batch": 1}]


@pytest.mark.parametrize("line", ["nonsense", "[1]", "", "\ufffd"])
def test_a_damaged_line_within_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"macro_batch": 1}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is not a JSON object"):
        read_metrics(tmp_path)


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


@contextlib.contextmanager
def files_of_at_most(size):
    """While entered, the system refuses what would make a file longer, after it has written what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(resource is None, reason="limits are POSIX")
def test_lines_that_find_no_room_wait_and_are_written_whole_and_in_order(tmp_path):
    messages = []
    files = MetricsFiles(tmp_path, messages.append)
    files.open(None, None)
    files.record({"macro_batch": 1})
    with files_of_at_most((tmp_path / "metrics.jsonl").stat().st_size + 5):
        files.record({"macro_batch": 2})
        files.sample(2, "two")
        files.record({"macro_batch": 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"macro_batch": 1}\n'  # of line 2, five bytes were written
    files.record({"macro_batch": 4})
    assert read_metrics(tmp_path) == [{"macro_batch": number} for number in (1, 2, 3, 4)]
    assert read_samples(tmp_path) == [{"macro_batch": 2, "text": "two"}]
    reason = "[Errno 27] File too large; training continues, lines wait until there is room"
    assert messages == [f"metrics.jsonl cannot be written: {reason}", "all waiting lines have been written"]
    assert files.state_dict() == {"waiting": []}


@pytest.mark.parametrize("written_after", [False, True])
def test_lines_that_wait_survive_in_the_snapshot(tmp_path, written_after):
    """Each is there once, whether or not it found room after the snapshot and before the crash."""
    files = new(tmp_path)
    files.record({"macro_batch": 1})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "hidden")
    (tmp_path / "metrics.jsonl").mkdir()
    files.record({"macro_batch": 2})
    files.record({"macro_batch": 3, "val_loss": math.nan})
    state = json.loads(json.dumps(files.state_dict()))
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "hidden").rename(tmp_path / "metrics.jsonl")
    if written_after:
        files.record({"macro_batch": 4})
    resumed = MetricsFiles(tmp_path)
    resumed.load_state_dict(state)
    resumed.open(3, None)
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert math.isnan(read_metrics(tmp_path)[2]["val_loss"])


def test_what_finds_no_room_to_the_end_is_named(tmp_path):
    messages = []
    files = MetricsFiles(tmp_path / "nowhere", messages.append)
    files.record({"macro_batch": 1})
    files.record({"macro_batch": 2})
    files.log_steps([{"step": step} for step in range(5, 50)])
    files.close("finished")
    assert messages[1:] == [
        "metrics.jsonl lacks macro-batch 1, 2; resume writes those that the last snapshot holds",
        "steps.jsonl lacks step 5 to 49; resume writes those that the last snapshot holds",
    ]


def test_steps_are_read_back_with_nan_and_whatever_the_objective_measures(tmp_path):
    files = new(tmp_path)
    files.log_steps([{"step": 1, "loss": 2.5, "accuracy": 0.25}, {"step": 2, "loss": math.nan, "skipped": 1}])
    files.log_steps([])
    files.log_steps([{"step": 3, "loss": math.inf}])
    first, second, third = read_steps(tmp_path)
    assert first == {"step": 1, "loss": 2.5, "accuracy": 0.25}
    assert math.isnan(second["loss"]) and second["skipped"] == 1
    assert third == {"step": 3, "loss": math.inf}
    assert (tmp_path / "steps.jsonl").read_text().splitlines()[1] == (
        '{"step": 2, "loss": null, "skipped": 1, "not_finite": {"loss": "nan"}}'
    )


@pytest.mark.skipif(resource is None, reason="limits are POSIX")
def test_steps_that_find_no_room_wait_and_are_written_whole_and_in_order(tmp_path):
    files = new(tmp_path)
    files.log_steps([{"step": 1}, {"step": 2}])
    with files_of_at_most((tmp_path / "steps.jsonl").stat().st_size + 15):
        files.log_steps([{"step": 3}, {"step": 4}])
        waiting = files.state_dict()["waiting"]
        files.log_steps([{"step": 5}])
    assert (tmp_path / "steps.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert waiting == [["steps.jsonl", {"step": 3}], ["steps.jsonl", {"step": 4}]]
    files.log_steps([{"step": 6}])
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2, 3, 4, 5, 6]
    resumed = MetricsFiles(tmp_path)
    resumed.load_state_dict({"waiting": waiting})
    resumed.open(0, 4)
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2, 3, 4]


def test_steps_are_on_disk_when_a_snapshot_is(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("cleangpt.tracking.metrics.fsync_file", lambda path: synced.append(path.read_bytes()))
    files = new(tmp_path)
    files.log_steps([{"step": 1}])
    assert synced == []
    files.state_dict()
    assert synced == [b'{"step": 1}\n']


def test_a_disk_that_fails_when_steps_are_synced_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("cleangpt.tracking.metrics.fsync_file", fail)
    messages = []
    files = MetricsFiles(tmp_path, messages.append)
    files.open(None, None)
    files.log_steps([{"step": 1}])
    assert files.state_dict() == {"waiting": []}
    assert messages == ["steps.jsonl could not be flushed to the disk: [Errno 5] Input/output error"]


def test_damage_after_the_snapshot_by_a_power_cut_does_not_stop_a_resume(tmp_path):
    new(tmp_path).log_steps([{"step": 1}, {"step": 2}])
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n" + b'{"step": 4}\n')
    new(tmp_path, 1, 2)
    assert (tmp_path / "steps.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_of_metrics_is_refused_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"macro_batch": 1}\nnonsense\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is not a JSON object"):
        new(tmp_path, 2, 2)


def test_an_unknown_key_is_an_objectives_metric_or_a_score():
    names = ["val_loss", "exact_match", "rouge", "train_accuracy", "val_accuracy", "val_loss/code", "exact_match/a"]
    assert scores(names) == ["exact_match", "rouge", "exact_match/a"]
    assert [name for name in names if is_objective_metric(name)] == ["train_accuracy", "val_accuracy"]
    assert metric("val_accuracy").label == "validation accuracy"
    assert metric("val_loss/code").label == "validation loss, code"


def test_tags_are_in_groups_and_each_stands_for_one_metric():
    tags = {name: tag(name) for name in METRICS}
    step_tags = {name: step_tag(name) for name in STEP_METRICS}
    axes = {"step", "tokens", "macro_batch"}
    both = [*tags.values(), *(value for name, value in step_tags.items() if name not in ("step", "samples", "tokens"))]
    assert len(set(both)) == len(both)
    groups = {value.split("/")[0] for value in both if value not in axes}
    assert groups == {"train", "val", "macro_batch", "speed", "data", "system", "tasks", "rollout"}
    assert all("/" in value for value in both if value not in axes)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (step_tag("loss"), "train/loss"),
        (step_tag("tokens_per_second"), "speed/tokens_per_second"),
        (step_tag("accuracy"), "train/accuracy"),
        (tag("val_loss"), "val/loss"),
        (tag("val_loss/code"), "val/loss/code"),
        (tag("val_accuracy"), "val/accuracy"),
        (tag("train_loss"), "macro_batch/train_loss"),
        (tag("train_accuracy"), "macro_batch/train_accuracy"),
        (tag("visited_share"), "data/visited_share"),
        (tag("peak_memory"), "system/peak_memory"),
        (tag("exact_match/code"), "tasks/exact_match/code"),
        (tag("own_score"), "tasks/own_score"),
    ],
)
def test_a_tag_is_the_metric_in_its_group(found, wanted):
    assert found == wanted


@given(st.integers(0, 10**17))
def test_a_shown_count_is_right_to_three_figures(count):
    number, unit = re.fullmatch(r"([\d.,e+]+)([kMGTP]?)", show_count(count)).groups()
    value = float(number.replace(",", "")) * 1000 ** " kMGTP".index(unit or " ")
    assert abs(value - count) <= 0.0051 * count
    assert len(show_count(count)) <= 6


@given(st.integers(0, 2**59))
def test_shown_bytes_are_right_and_at_least_one_of_their_unit(size):
    number, unit = show_bytes(size).split()
    power = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(float(number) * 1024**power - size) <= 0.0006 * size
    assert float(number) >= 1 or size == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0123, "12.3 ms"),
        (3.4179, "3.42 s"),
        (59.94, "59.9 s"),
        (60, "0:01:00"),
        (3599.6, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_time_is_shown_in_a_fitting_unit(seconds, words):
    assert show_time(seconds) == words


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("val_loss", 1.46966, "1.4697"),
        ("val_loss", 0.0123456, "0.0123"),
        ("val_loss", 0.000012345, "0.0000123"),
        ("val_loss", 0.0099996, "0.01000"),
        ("bits_per_byte", 1.2345e-9, "1.23e-09"),
        ("val_loss", 0.0, "0"),
        ("visited_share", 0.000412, "0.0412 %"),
        ("mfu", 1.0, "100.0 %"),
        ("visited_share", 0.2314, "23.1 %"),
        ("lr", 6e-5, "6e-05"),
        ("tokens_per_second", 123456.7, "123k"),
        ("peak_memory", 812 * 2**20, "812 MiB"),
        ("mfu", None, "–"),
        ("val_loss", math.nan, "nan"),
        ("own_score", 0.5, "0.5"),
    ],
)
def test_a_metric_is_shown_in_its_unit(name, value, words):
    assert show(name, value) == words
