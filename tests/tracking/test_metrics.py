"""The files of figures: strict JSON, nothing lost, nothing of an abandoned future kept."""

import contextlib
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cleangpt.errors import UserError
from cleangpt.tracking.metrics import (
    FIGURES,
    MetricsFiles,
    read_metrics,
    read_samples,
    scores,
    show,
    show_bytes,
    show_count,
    show_time,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

EVERY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
VALUES = st.none() | st.integers(-(2**60), 2**60) | st.floats()
ROWS = st.lists(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "not_finite"), VALUES), max_size=5)


def new(run, truncate_after=None):
    files = MetricsFiles(run)
    files.open(truncate_after)
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
        files.record({"macro_batch": macro_batch, "val_loss": 1 / macro_batch})
        files.sample(macro_batch, "text")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    resumed = new(tmp_path, truncate_after)
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
    said = []
    files = MetricsFiles(tmp_path, said.append)
    files.open(None)
    files.record({"macro_batch": 1})
    with files_of_at_most((tmp_path / "metrics.jsonl").stat().st_size + 5):
        files.record({"macro_batch": 2})
        files.sample(2, "two")
        files.record({"macro_batch": 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"macro_batch": 1}\n'  # of line 2, five bytes were written
    files.record({"macro_batch": 4})
    assert read_metrics(tmp_path) == [{"macro_batch": number} for number in (1, 2, 3, 4)]
    assert read_samples(tmp_path) == [{"macro_batch": 2, "text": "two"}]
    assert said == [
        "metrics.jsonl cannot be written: [Errno 27] File too large; training goes on, and lines wait until it can",
        "every line that waited is written",
    ]
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
    resumed.open(3)
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert math.isnan(read_metrics(tmp_path)[2]["val_loss"])


def test_what_finds_no_room_to_the_end_is_named(tmp_path):
    said = []
    files = MetricsFiles(tmp_path / "nowhere", said.append)
    files.record({"macro_batch": 1})
    files.record({"macro_batch": 2})
    files.close("finished")
    assert said[1:] == ["metrics.jsonl lacks macro-batch 1, 2; resume writes what the last snapshot has of it"]


def test_any_unknown_key_is_a_score():
    assert scores({"val_loss": 1, "exact_match": 1, "rouge": 0.5}) == ["exact_match", "rouge"]
    assert all(figure.label and figure.meaning for figure in FIGURES.values())


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
    [(0.0123, "12.3 ms"), (59.94, "59.9 s"), (60, "0:01:00"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_time_is_shown_in_a_fitting_unit(seconds, words):
    assert show_time(seconds) == words


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("val_loss", 1.46966, "1.4697"),
        ("visited_share", 0.2314, "23.1 %"),
        ("lr", 6e-5, "6e-05"),
        ("tokens_per_second", 123456.7, "123k"),
        ("peak_memory", 812 * 2**20, "812 MiB"),
        ("mfu", None, "–"),
        ("val_loss", math.nan, "nan"),
        ("own_score", 0.5, "0.5"),
    ],
)
def test_a_figure_is_shown_in_its_unit(name, value, words):
    assert show(name, value) == words
