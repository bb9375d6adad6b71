"""A process killed at any moment loses nothing: the resumed run ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cleangpt.checkpoints.snapshots import list_snapshots, newest_snapshot
from cleangpt.tracking.metrics import read_metrics

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


def start(*words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "cleangpt", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*words: str) -> str:
    process = start(*words)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    return output.decode()


def wait_for(condition: "object", process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)


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
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
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

def write_half(tensors, path):
    save_file(tensors, path)
    if "mb000004." in str(path) and os.environ.get("DYING") == os.environ.get("RANK", "none"):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = write_half
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_killed_while_it_writes_its_shard_leaves_the_snapshot_before(workplace: Path, rank: str) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT + KILLED_WHILE_WRITING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "cleangpt", "train", "killed.py", "--run-dir", "run"]
    process = subprocess.run(command, capture_output=True, timeout=120, env=os.environ | {"DYING": rank})
    assert process.returncode != 0
    assert list(Path("run/snapshots").glob("mb000004.*.partial"))
    newest, complaints = newest_snapshot(Path("run/snapshots"))
    assert newest is not None and newest.name == "mb000003" and not complaints
    finish("resume", "run", "--training.macro-batches", "6")
    assert "going on from run/snapshots/mb000003" in Path("run/log.txt").read_text()
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, 7))
    assert not list(Path("run").rglob("*.partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="the process is asked to stop by SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_exits_0_and_says_how_to_go_on(workplace: Path, number: signal.Signals) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT)
    process = start("train", "killed.py", "--run-dir", "run", "--training.macro-batches", "1000")
    wait_for(lambda: Path("run/metrics.jsonl").exists() and len(read_metrics(Path("run"))) >= 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "finishing the step and saving" in output.decode()
    assert "go on with: cleangpt resume run" in output.decode()
    done = len(read_metrics(Path("run")))
    finish("resume", "run", "--training.macro-batches", str(done + 1))
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, done + 2))


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(workplace: Path) -> None:
    (workplace / "killed.py").write_text(EXPERIMENT)
    first = start("train", "killed.py", "--run-dir", "run", "--training.macro-batches", "1000")
    wait_for(lambda: Path("run/metrics.jsonl").exists() and len(read_metrics(Path("run"))) >= 1, first)
    before, experiment = Path("run/metrics.jsonl").read_bytes(), Path("run/experiment.json").read_bytes()
    second = start("resume", "run", "--optimizer.lr", "0.5")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert output.decode() == "error: run is being trained by another process; wait for it, or stop it first\n"
    assert Path("run/metrics.jsonl").read_bytes().startswith(before)
    assert Path("run/experiment.json").read_bytes() == experiment
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    done = len(read_metrics(Path("run")))
    finish("resume", "run", "--training.macro-batches", str(done + 1))
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, done + 2))
