"""A process killed at any moment loses nothing: the resumed run ends with the same bits."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cleangpt.checkpoints.snapshots import list_snapshots, newest_snapshot
from cleangpt.tracking.metrics import read_metrics
from tests.forked import Command, run, run_together, start

EXPERIMENT = """
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="killed",
    corpus=Adder(digits=2, train_samples=500, val_samples=100, test_samples=10),
    data=DataConfig(seq_len=9, batch_size=16),
    model=GPTConfig(max_seq_len=9, n_layers=2, n_heads=2, dim=32, dropout=0.1),
    optimizer=OptimizerConfig(lr=1e-2),
    schedule=ScheduleConfig(batch_size=Schedule(shape="linear", initial=0.25)),
    training=TrainingConfig(macro_batches=30, batches_per_macro_batch=10, accumulation=4, device="cpu", threads=1),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(sample_tokens=4, score_samples=20),
)
"""


def finish(*words: str) -> None:
    done = run(*words)
    assert done.returncode == 0, done.stderr


def wait_for(condition: Callable[[], bool], process: Command) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def metrics_lines() -> int:
    """How many macro-batches of the run `run` are recorded."""
    return len(read_metrics(Path("run"))) if Path("run/metrics.jsonl").exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_run_killed_at_several_points_ends_with_the_same_bits(workplace: Path) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT)
    finish("train", "killed.py", "--run-dir", "unbroken")
    kills = [
        lambda: Path("broken/experiment.json").exists(),
        lambda: Path("broken/metrics.jsonl").exists() and len(read_metrics(Path("broken"))) >= 4,
        lambda: any(Path("broken/snapshots").glob("*.partial")),
        lambda: any(Path("broken/checkpoints").glob("*.partial")),
        lambda: len(read_metrics(Path("broken"))) >= 20,
    ]
    for condition in kills:
        process = start("train", "killed.py", "--run-dir", "broken")
        wait_for(condition, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finish("resume", "broken")
    assert [line["macro_batch"] for line in read_metrics(Path("broken"))] == list(range(1, 31))
    one, two = (load_file(list_snapshots(Path(run) / "snapshots")[0] / "shard_00000.safetensors")
                for run in ("unbroken", "broken"))  # fmt: skip
    assert one.keys() == two.keys() and any(name.startswith("model/") for name in one)
    assert all((one[name].numpy().tobytes() == two[name].numpy().tobytes()) for name in one)
    assert not list(Path("broken").rglob("*.partial")) and not list(Path("broken").rglob("*.old"))


KILLED_WHILE_WRITING = """
import os
import signal
from cleangpt.checkpoints import tensor_files as shards

save_file = shards.save_file

def write_half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if "snapshots/mb000004." in str(path) and os.environ.get("DYING") == os.environ.get("RANK", "none"):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = write_half
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_killed_while_it_writes_its_shard_leaves_the_snapshot_before(workplace: Path, rank: str) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT + KILLED_WHILE_WRITING)
    died = run_together(2, "train", "killed.py", "--run-dir", "run", DYING=rank)
    assert died.returncode != 0
    assert list(Path("run/snapshots").glob("mb000004.*.partial")), died.stderr
    newest, complaints = newest_snapshot(Path("run/snapshots"))
    assert newest is not None and newest.name == "mb000003" and not complaints
    finish("resume", "run", "--training.macro-batches", "6")
    assert "resuming from run/snapshots/mb000003" in Path("run/log.txt").read_text()
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, 7))
    assert not list(Path("run").rglob("*.partial"))


@pytest.mark.default(1)
@pytest.mark.skipif(sys.platform == "win32", reason="the process is asked to stop by SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_exits_0_and_says_how_to_go_on(workplace: Path, number: signal.Signals) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT)
    process = start("train", "killed.py", "--run-dir", "run", "--training.macro-batches", "1000")
    wait_for(lambda: metrics_lines() >= 2, process)
    process.send_signal(number)
    assert process.wait() == 0
    output = process.stdout + process.stderr
    assert "finishing the step and saving" in output
    assert "to continue: cleangpt resume run" in output
    done = len(read_metrics(Path("run")))
    finish("resume", "run", "--training.macro-batches", str(done + 1))
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, done + 2))


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(workplace: Path) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT)
    first = start("train", "killed.py", "--run-dir", "run", "--training.macro-batches", "1000")
    wait_for(lambda: metrics_lines() >= 1, first)
    before, experiment = Path("run/metrics.jsonl").read_bytes(), Path("run/experiment.json").read_bytes()
    second = run("resume", "run", "--optimizer.lr", "0.5")
    assert second.returncode == 2 and second.stdout == ""
    assert second.stderr.startswith(f"error: run is being trained by process {first.pid} on ")
    assert Path("run/metrics.jsonl").read_bytes().startswith(before)
    assert Path("run/experiment.json").read_bytes() == experiment
    first.kill()
    first.wait()
    done = len(read_metrics(Path("run")))
    finish("resume", "run", "--training.macro-batches", str(done + 1))
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, done + 2))
