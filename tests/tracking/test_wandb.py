"""Weights & Biases, run offline; its own files are read back."""

import json
import struct
import time
from dataclasses import replace

import pytest

wandb = pytest.importorskip("wandb")

from wandb.proto import wandb_internal_pb2  # noqa: E402

from cleangpt.config import TrackingConfig  # noqa: E402
from cleangpt.errors import UserError  # noqa: E402
from tests.tracking.opening import open_trackers  # noqa: E402

CONFIG = TrackingConfig(wandb="offline", wandb_project="proof")
EXPERIMENT_JSON = {"name": "tiny", "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}}


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, position, content = path.read_bytes(), 7, b""
    while position < len(data):
        rest = 32768 - position % 32768
        if rest < 7:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(content)
            content = b""


def run_files(run, count=1):
    """The .wandb files of the parts of a run, in order; W&B's own process finishes writing them after `finish`."""
    for _ in range(600):
        paths = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        if len(paths) == count and all(the("exit", path) for path in paths):
            return paths
        time.sleep(0.05)
    raise AssertionError(f"{count} finished run files expected, there are {paths}")


def history(path):
    """The rows logged, each as ``{name: value}``, without W&B's own keys."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def the(kind, path):
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def begin(run, state=None, truncate_after=None, last_step=None):
    return open_trackers(
        CONFIG,
        run,
        experiment_json=EXPERIMENT_JSON,
        state=state,
        truncate_after=truncate_after,
        last_step=last_step,
    )


def rows(*steps, **metrics):
    return [{"step": step, "tokens": 8 * step, "loss": 3 - step / 10, **metrics} for step in steps]


def validated(macro_batch, step, val_loss, **metrics):
    return {"macro_batch": macro_batch, "step": step, "tokens": 8 * step, "val_loss": val_loss, **metrics}


@pytest.mark.slow
def test_metrics_config_and_samples_reach_the_run_file(tmp_path):
    trackers = begin(tmp_path)
    trackers.log_steps(rows(1, 2))
    trackers.record(validated(1, 2, 2.5, mfu=None))
    trackers.log_steps(rows(3, skipped=1))
    trackers.record(validated(2, 4, float("nan"), peak_memory=5))
    trackers.sample(2, "<b>to & fro")
    trackers.close("finished")
    (path,) = run_files(tmp_path)
    logged = history(path)
    assert logged[:3] == [
        {"step": 1, "tokens": 8, "train/loss": 2.9},
        {"step": 2, "tokens": 16, "train/loss": 2.8, "val/loss": 2.5, "macro_batch": 1},
        {"step": 3, "tokens": 24, "train/loss": 2.7, "train/skipped": 1},
    ]
    (page,) = path.parent.glob("files/media/html/*.html")
    assert "<pre>&lt;b&gt;to &amp; fro</pre>" in page.read_text(encoding="utf-8")
    assert logged[3]["sample.path"] == f"media/html/{page.name}"
    assert (logged[3]["step"], logged[3]["system/peak_memory"], "val/loss" in logged[3]) == (4, 5, False)
    started = the("run", path)[0]
    config = {entry.key: json.loads(entry.value_json) for entry in started.config.update}
    assert started.project == "proof"
    assert started.display_name == f"tiny {tmp_path.name}"
    assert {name: config[name] for name in EXPERIMENT_JSON} == EXPERIMENT_JSON
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in the("metric", path)}
    assert axes.items() >= {"*": "step", "step": "", "tokens": "", "val/loss": "step"}.items(), (
        "earlier versions add all"
    )


def test_the_step_of_wandb_is_that_of_the_run(tmp_path):
    trackers = begin(tmp_path)
    trackers.log_steps(rows(10, 20))
    trackers.record(validated(1, 25, 2.0))
    trackers.close("finished")
    (path,) = run_files(tmp_path)
    steps = [record.history.step.num for record in records(path) if record.WhichOneof("record_type") == "history"]
    assert steps == [10, 20, 25]


def test_resume_continues_the_same_run(tmp_path):
    first = begin(tmp_path)
    first.log_steps(rows(1, 2))
    first.record(validated(1, 2, 2.5))
    state = json.loads(json.dumps(first.state_dict()))
    first.close("interrupted")
    second = begin(tmp_path, state, truncate_after=1, last_step=2)
    second.log_steps(rows(3, 4))
    second.record(validated(2, 4, 2.0))
    second.close("finished")
    assert second.state_dict() == state
    paths = run_files(tmp_path, count=2)
    assert [the("run", path)[0].run_id for path in paths] == 2 * [state["wandb"]["id"]]
    assert [(row["step"], row.get("val/loss")) for path in paths for row in history(path)] == [
        (1, None),
        (2, 2.5),
        (3, None),
        (4, 2.0),
    ]


def session(run, steps, *, state=None, last=None, killed=False, samples=()):
    """Logs steps, two to a macro-batch, to the files and to W&B; a killed session never closes."""
    trackers = begin(run, state, truncate_after=None if last is None else last // 2, last_step=last)
    for step in steps:
        trackers.log_steps(rows(step))
        if step % 2 == 0:
            trackers.record(validated(step // 2, step, 3 - step / 10))
        if step in samples:
            trackers.sample(step // 2, f"text {step}")
    state = json.loads(json.dumps(trackers.state_dict()))
    if killed:  # its process and W&B's are gone; what of its file was written is anyone's guess
        trackers._others["wandb"]._run.finish()
        trackers._files.close("failed")
    else:
        trackers.close("interrupted")
    return state


def truncated(run, share):
    """Cuts the newest .wandb file, as a killed process leaves it, at a share of its bytes."""
    path = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


TORTURE = [pytest.param(at, share, marks=pytest.mark.torture) for at in (None, 0, 2, 5, 6) for share in (0, 0.5, 1)]


@pytest.mark.parametrize(("snapshot", "share"), [(5, 0.5), *TORTURE])
def test_after_a_session_was_killed_every_macro_batch_stands_once(tmp_path, snapshot, share):
    """Wherever its snapshot was (None: there was none yet), and whatever W&B has written of it, once or twice."""
    first = session(tmp_path, [1, 2])
    session(tmp_path, range(3, 7), state=first, last=2, killed=True, samples=[4, 6])
    run_files(tmp_path, count=2)
    truncated(tmp_path, share)
    state = None if snapshot is None else first
    start = snapshot or 0
    session(tmp_path, range(start + 1, 8), state=state, last=snapshot, killed=True, samples=[4, 6])
    truncated(tmp_path, share)
    session(tmp_path, range(start + 1, 11), state=state, last=snapshot, samples=[4, 6])
    paths = run_files(tmp_path, count=2)
    assert {the("run", path)[0].run_id for path in paths} == {first["wandb"]["id"]}
    told = [row for path in paths for row in history(path)]
    assert [row["step"] for row in told] == list(range(1, 11))
    assert [row["macro_batch"] for row in told if "macro_batch" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in told if "sample.path" in row] == [4, 6]
    assert [row["val/loss"] for row in told if "val/loss" in row] == [pytest.approx(3 - 0.2 * n) for n in range(1, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("online", [False, True])
def test_a_macro_batch_whose_steps_were_logged_before_a_stop_is_logged_after_it(tmp_path, monkeypatch, online):
    """As where a signal interrupts its validation: the same step as that of the last row."""
    first = begin(tmp_path)
    first.log_steps(rows(1, 2, 3))
    state = first.state_dict()
    first.close("interrupted")
    if online:
        start = wandb.init
        monkeypatch.setattr(wandb, "init", lambda **options: Remembering(start(**options)))
    second = begin(tmp_path, state, truncate_after=0, last_step=3)
    second.record(validated(1, 3, 2.0))
    second.sample(1, "text")
    second.log_steps(rows(4))
    second.close("finished")
    told = [row for path in run_files(tmp_path, count=2) for row in history(path)]
    assert [row["macro_batch"] for row in told if "macro_batch" in row] == [1]
    assert sum("sample.path" in row for row in told) == 1
    assert [row["step"] for row in told if "train/loss" in row] == [1, 2, 3, 4]


def test_what_has_not_reached_the_server_is_logged_again(tmp_path, monkeypatch):
    start = wandb.init
    state = session(tmp_path, range(1, 9))
    (tmp_path / "wandb.json").unlink()
    monkeypatch.setattr(wandb, "init", lambda **options: Remembering(start(**options)))
    session(tmp_path, [9, 10], state=state, last=8)
    assert [row["step"] for row in history(run_files(tmp_path, count=2)[1])] == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"id": "a"}', '{"id": "a", "sessions": [{"folder": "../x", "step": 1}]}']
)
def test_a_file_of_sessions_that_is_not_ours_is_passed_over(tmp_path, content):
    (tmp_path / "wandb.json").write_text(content)
    session(tmp_path, [1, 2])
    assert [row["step"] for row in history(run_files(tmp_path)[0])] == [1, 2]


@pytest.mark.parametrize("project", ["a/b", "a:b", "50%", 129 * "a"])
def test_a_setting_that_wandb_refuses_is_a_mistake_and_the_files_stay(tmp_path, project):
    (tmp_path / "metrics.jsonl").write_text('{"macro_batch": 1}\n')
    config = replace(CONFIG, wandb_project=project)
    with pytest.raises(UserError, match=r"tracking.wandb is 'offline', and W&B refuses: Invalid project name"):
        open_trackers(config, tmp_path, experiment_json=EXPERIMENT_JSON)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}
    assert (tmp_path / "metrics.jsonl").read_text()


def test_two_new_runs_are_two(tmp_path):
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trackers = begin(tmp_path / name)
        ids.add(trackers.state_dict()["wandb"]["id"])
        trackers.close("finished")
    assert len(ids) == 2


class Remembering:
    """A W&B run whose server has its steps up to 3, as wandb reports it when a run is resumed online."""

    step = 4

    def __init__(self, run):
        self._run = run

    def __getattr__(self, name):
        return getattr(self._run, name)


def test_what_the_server_has_is_not_logged_again(tmp_path, monkeypatch):
    start = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: Remembering(start(**options)))
    trackers = begin(tmp_path, {"wandb": {"id": "again"}}, truncate_after=1, last_step=2)
    for macro_batch, step in ((2, 3), (3, 4)):
        trackers.log_steps(rows(step))
        trackers.record(validated(macro_batch, step, 2.0))
        trackers.sample(macro_batch, "text")
    trackers.close("finished")
    (row,) = history(run_files(tmp_path)[0])
    assert (row["step"], row["macro_batch"], "sample.path" in row) == (4, 3, True)


def test_after_a_roll_back_only_steps_beyond_the_last_are_logged(tmp_path):
    trackers = begin(tmp_path)
    trackers.log_steps(rows(1))
    state = trackers.state_dict()
    trackers.log_steps(rows(2, 3))
    trackers.rewind(state, 0, 1)
    trackers.log_steps(rows(2, 3, 4, 5))
    trackers.close("finished")
    assert [row["step"] for row in history(run_files(tmp_path)[0])] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("stopped early", 0), ("interrupted", 0), ("failed", 1)])
def test_only_a_failed_run_ends_as_crashed(tmp_path, status, code):
    begin(tmp_path).close(status)
    (path,) = run_files(tmp_path)
    assert [end.exit_code for end in the("exit", path)] == [code]
    updates = [entry for part in the("summary", path) for entry in part.update]
    assert [json.loads(entry.value_json) for entry in updates if "status" in (entry.key, *entry.nested_key)][
        -1
    ] == status


def test_the_end_of_a_run_waits_for_the_server_for_a_minute_at_most(tmp_path):
    trackers = begin(tmp_path)
    settings = trackers._others["wandb"]._run.settings
    assert (settings.finish_timeout, settings.finish_timeout_raises) == (60, True)
    trackers.close("finished")
