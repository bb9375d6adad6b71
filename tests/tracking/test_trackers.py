"""All trackers together: their contract with the trainer, and none may stop it."""

import random
import sys

import numpy as np
import pytest
import torch

from cleangpt.commands import main
from cleangpt.config import TrackingConfig
from cleangpt.errors import UserError
from cleangpt.tracking import NullTracker, Trackers, check_tracking
from cleangpt.tracking.metrics import MetricsFiles, read_metrics, read_samples, read_steps
from tests.tracking.opening import open_trackers


def begin(run, log=None, **tracking):
    return open_trackers(TrackingConfig(**tracking), run, experiment_json={"a": 1}, log=log)


class Faulty:
    """A tracker that fails when asked to do `what`, and counts how often it was called at all."""

    def __init__(self, what):
        self.what, self.calls, self.state = what, 0, {"id": "new"}

    def _do(self, what):
        self.calls += 1
        if what == self.what:
            raise ConnectionError(f"cannot {what}:\n no network")

    def open(self, truncate_after, last_step):
        self._do("open")

    def record(self, metrics):
        self._do("record")

    def log_steps(self, rows):
        self._do("log_steps")

    def sample(self, macro_batch, text):
        self._do("sample")

    def close(self, status):
        self._do("close")

    def state_dict(self):
        if self.what == "state_dict":
            raise ConnectionError(f"cannot {self.what}:\n no network")
        return self.state

    def load_state_dict(self, state):
        if self.what == "load_state_dict":
            raise ConnectionError(f"cannot {self.what}:\n no network")
        self.state = state or self.state


CALLS = [("open", 1), ("log_steps", 2), ("record", 3), ("sample", 4), ("close", 8), ("", 8)]


@pytest.mark.parametrize(("what", "calls"), CALLS)
def test_a_tracker_that_fails_is_reported_once_and_dropped(tmp_path, what, calls):
    faulty, good, messages = Faulty(what), Faulty(""), []
    trackers = Trackers(MetricsFiles(tmp_path), {"faulty": faulty, "good": good}, messages.append)
    trackers.open(None, None)
    for macro_batch in (1, 2):
        trackers.log_steps([{"step": macro_batch}])
        trackers.record({"macro_batch": macro_batch})
        trackers.sample(macro_batch, "text")
    trackers.close("finished")
    message = f"faulty failed and is dropped, training continues without it: cannot {what}: no network"
    assert messages == ([message] if what else [])
    assert (faulty.calls, good.calls) == (calls, 8)
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [1, 2]
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2]
    assert len(read_samples(tmp_path)) == 2


def test_metrics_that_cannot_be_written_are_reported_once_and_do_not_stop_the_training(tmp_path):
    messages = []
    trackers = begin(tmp_path, messages.append)
    (tmp_path / "metrics.jsonl").mkdir()
    trackers.record({"macro_batch": 1})
    trackers.record({"macro_batch": 2})
    assert len(messages) == 1 and messages[0].startswith("metrics.jsonl cannot be written: [Errno")
    (tmp_path / "metrics.jsonl").rmdir()
    trackers.close("finished")
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [1, 2]


def test_state_survives_a_failure_and_a_tracker_switched_off(tmp_path):
    trackers = Trackers(MetricsFiles(tmp_path), {"faulty": Faulty("open")}, lambda _: None)
    trackers.load_state_dict({"faulty": {"id": "old"}, "wandb": {"id": "kept"}})
    trackers.open(3, 6)
    waiting = {"files": {"waiting": []}}
    assert trackers.state_dict() == {"faulty": {"id": "old"}, "wandb": {"id": "kept"}} | waiting


@pytest.mark.parametrize(
    ("options", "package"), [({"wandb": "offline"}, "wandb"), ({"tensorboard": True}, "tensorboard")]
)
def test_a_missing_package_is_refused_by_its_name(tmp_path, monkeypatch, options, package):
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(UserError, match=rf"not installed: pip install {package}$"):
        begin(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_reported_on_the_screen_and_in_the_log(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("cleangpt.tracking.wandb.WandbTracker.open", refuse)
    trackers = begin(tmp_path, wandb="offline")
    trackers.record({"macro_batch": 1})
    message = "wandb failed and is dropped, training continues without it: no network"
    assert capsys.readouterr().err == message + "\n"
    assert message in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert set(trackers.state_dict()["wandb"]) == {"id"}


@pytest.mark.slow
def test_tracking_draws_no_random_number(tmp_path):
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    trackers = begin(tmp_path, wandb="offline", tensorboard=True)
    trackers.log_steps([{"step": 1, "tokens": 8, "loss": 2.0}])
    trackers.record({"macro_batch": 1, "step": 1, "tokens": 8, "val_loss": 2.0})
    trackers.sample(1, "text")
    trackers.close("finished")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("what", ["state_dict", "load_state_dict"])
def test_a_tracker_that_cannot_give_or_take_its_state_costs_no_snapshot(tmp_path, what):
    """Its last known state is kept, so that it can come back."""
    messages = []
    trackers = Trackers(MetricsFiles(tmp_path), {"faulty": Faulty(what)}, messages.append)
    trackers.load_state_dict({"faulty": {"id": "old"}})
    trackers.open(None, None)
    trackers.record({"macro_batch": 1})
    kept = [trackers.state_dict()["faulty"] for _ in range(2)]
    assert kept == [{"id": "old" if what == "state_dict" else "new"}] * 2
    message = f"faulty failed and is dropped, training continues without it: cannot {what}: no network"
    assert messages == [message]
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [1]


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    """A home without an API key of W&B."""
    pytest.importorskip("wandb").teardown()
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_online_without_a_key_is_refused_before_training(no_key, workplace, monkeypatch, capsys):
    assert main(["train", "adder", "--tracking.wandb", "online"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: tracking.wandb is 'online', and Weights & Biases has no API key here; run wandb login"
    )
    assert not (workplace / "runs").exists() and not (workplace / "data").exists()
    monkeypatch.setenv("RANK", "1")
    check_tracking(TrackingConfig(wandb="online"))  # another process than the one that tracks needs none


@pytest.mark.parametrize("host", ["api.wandb.ai", "here.example"])
def test_a_key_of_wandb_is_found_in_the_environment_and_in_netrc(no_key, monkeypatch, host):
    no_key.write_text(f"machine {host} login user password {'0' * 40}\n")
    monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}")
    check_tracking(TrackingConfig(wandb="online"))
    no_key.write_text("machine elsewhere.example login user password secret\n")
    with pytest.raises(UserError, match="has no API key here"):
        check_tracking(TrackingConfig(wandb="online"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_tracking(TrackingConfig(wandb="online"))


@pytest.mark.slow
def test_a_server_of_wandb_that_cannot_be_reached_costs_its_metrics_only(tmp_path, monkeypatch):
    """Really tried, at a port where nobody listens."""
    pytest.importorskip("wandb").teardown()  # it reads its environment once a process
    for name, value in {
        "BASE_URL": "http://127.0.0.1:9", "API_KEY": "0" * 40, "INIT_TIMEOUT": "3", "SILENT": "true", "MODE": "online",
        "CONFIG_DIR": str(tmp_path / "config"), "CACHE_DIR": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    messages = []
    trackers = begin(tmp_path, messages.append, wandb="online")
    trackers.record({"macro_batch": 1})
    trackers.close("finished")
    assert len(messages) == 1 and messages[0].startswith("wandb failed and is dropped, training continues without it: ")
    assert [row["macro_batch"] for row in read_metrics(tmp_path)] == [1]
    assert trackers.state_dict()["wandb"]["id"]


def test_a_roll_back_reopens_every_tracker_at_the_snapshot(tmp_path):
    class Recorder(Faulty):
        opened = ()

        def open(self, truncate_after, last_step):
            self.opened += ((truncate_after, last_step, self.state),)

    recorder = Recorder("")
    trackers = Trackers(MetricsFiles(tmp_path), {"recorder": recorder}, lambda _: None)
    trackers.open(None, None)
    for step in (1, 2):
        trackers.log_steps([{"step": step}])
    state = trackers.state_dict()
    recorder.state = {"id": "later"}
    for step in (3, 4):
        trackers.log_steps([{"step": step}])
        trackers.record({"macro_batch": step})
    trackers.rewind(state, 0, 2)
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path) == []
    assert recorder.opened == ((None, None, {"id": "new"}), (0, 2, {"id": "new"}))


def test_other_processes_write_nothing(tmp_path):
    null = NullTracker(tmp_path)
    null.log_steps([{"step": 1}])
    null.record({"macro_batch": 1})
    null.sample(1, "text")
    null.rewind(null.state_dict(), 0, 0)
    null.close("finished")
    assert list(tmp_path.iterdir()) == []
