"""Weights & Biases, really run offline; its files are read back."""

import json
import struct
import time

import pytest

wandb = pytest.importorskip("wandb")

from wandb.proto import wandb_internal_pb2  # noqa: E402

from cleangpt.config import (  # noqa: E402
    CorpusConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.experiment import Experiment  # noqa: E402
from cleangpt.tracking import open_trackers  # noqa: E402

EXPERIMENT = Experiment(
    name="tiny",
    corpus=CorpusConfig(),
    data=DataConfig(seq_len=8, batch_size=2),
    model=ModelConfig(max_seq_len=8),
    optimizer=OptimizerConfig(lr=1e-3),
    training=TrainingConfig(macro_batches=4, batches_per_macro_batch=2),
    tracking=TrackingConfig(wandb="offline", wandb_project="proof"),
)
EXPERIMENT_JSON = {"name": "tiny", "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}}


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, position, whole = path.read_bytes(), 7, b""
    while position < len(data):
        rest = 32768 - position % 32768
        if rest < 7:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


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


def begin(run, state=None, truncate_after=None):
    return open_trackers(EXPERIMENT, EXPERIMENT_JSON, run, state, truncate_after)


def test_figures_config_and_samples_reach_the_run_file(tmp_path):
    trackers = begin(tmp_path)
    trackers.record({"macro_batch": 1, "val_loss": 2.5, "mfu": None})
    trackers.record({"macro_batch": 2, "val_loss": float("nan"), "train_loss": 2.25})
    trackers.sample(2, "<b>to & fro")
    trackers.close("finished")
    (path,) = run_files(tmp_path)
    rows = history(path)
    assert rows[:2] == [{"macro_batch": 1, "val_loss": 2.5}, {"macro_batch": 2, "train_loss": 2.25}]
    (page,) = path.parent.glob("files/media/html/*.html")
    assert "<pre>&lt;b&gt;to &amp; fro</pre>" in page.read_text(encoding="utf-8")
    assert (rows[2]["macro_batch"], rows[2]["sample.path"]) == (2, f"media/html/{page.name}")
    started = the("run", path)[0]
    config = {entry.key: json.loads(entry.value_json) for entry in started.config.update}
    assert started.project == "proof"
    assert started.display_name == f"tiny {tmp_path.name}"
    assert {name: config[name] for name in EXPERIMENT_JSON} == EXPERIMENT_JSON
    assert {"*", "macro_batch", "val_loss"} == {metric.glob_name or metric.name for metric in the("metric", path)}
    assert {metric.step_metric for metric in the("metric", path)} == {"", "macro_batch"}


def test_resume_goes_on_in_the_same_run(tmp_path):
    first = begin(tmp_path)
    first.record({"macro_batch": 1, "val_loss": 2.5})
    state = json.loads(json.dumps(first.state_dict()))
    first.close("interrupted")
    second = begin(tmp_path, state, truncate_after=1)
    second.record({"macro_batch": 2, "val_loss": 2.0})
    second.close("finished")
    assert second.state_dict() == state
    paths = run_files(tmp_path, count=2)
    assert [the("run", path)[0].run_id for path in paths] == 2 * [state["wandb"]["id"]]
    assert [row for path in paths for row in history(path)] == [
        {"macro_batch": 1, "val_loss": 2.5},
        {"macro_batch": 2, "val_loss": 2.0},
    ]


def test_two_new_runs_are_two(tmp_path):
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trackers = begin(tmp_path / name)
        ids.add(trackers.state_dict()["wandb"]["id"])
        trackers.close("finished")
    assert len(ids) == 2


def test_what_the_service_remembers_is_not_told_twice(tmp_path, monkeypatch):
    start = wandb.init

    def remembering(**options):
        run = start(**options)
        run.summary["macro_batch"] = 3
        return run

    monkeypatch.setattr(wandb, "init", remembering)
    trackers = begin(tmp_path, {"wandb": {"id": "again"}}, truncate_after=2)
    for macro_batch in (3, 4):
        trackers.record({"macro_batch": macro_batch})
        trackers.sample(macro_batch, "text")
    trackers.close("finished")
    assert [row["macro_batch"] for row in history(run_files(tmp_path)[0])] == [4, 4]


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("stopped early", 0), ("interrupted", 0), ("failed", 1)])
def test_only_a_failed_run_ends_as_crashed(tmp_path, status, code):
    begin(tmp_path).close(status)
    (path,) = run_files(tmp_path)
    assert [end.exit_code for end in the("exit", path)] == [code]
    updates = [entry for part in the("summary", path) for entry in part.update]
    assert [json.loads(entry.value_json) for entry in updates if "status" in (entry.key, *entry.nested_key)][
        -1
    ] == status


def test_the_end_of_a_run_waits_for_a_server_for_a_minute_at_most(tmp_path):
    trackers = open_trackers(EXPERIMENT, EXPERIMENT_JSON, tmp_path, None, None)
    settings = trackers._others["wandb"]._run.settings
    assert (settings.finish_timeout, settings.finish_timeout_raises) == (60, True)
    trackers.close("finished")
