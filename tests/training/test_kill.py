"""A process killed at any moment loses nothing: the resumed run ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.snapshots import list_snapshots

EXPERIMENT = """
from cleangpt.config import *
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
    one, two = (load_file(list_snapshots(Path(run) / "snapshots")[0] / "tensors.safetensors")
                for run in ("unbroken", "broken"))  # fmt: skip
    assert one.keys() == two.keys() and any(name.startswith("model/") for name in one)
    assert all((one[name].numpy().tobytes() == two[name].numpy().tobytes()) for name in one)
    assert not list(Path("broken").rglob("*.partial")) and not list(Path("broken").rglob("*.old"))


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
    before = Path("run/metrics.jsonl").read_bytes()
    second = start("resume", "run")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert output.decode() == "error: run is being trained by another process; wait for it, or stop it first\n"
    assert Path("run/metrics.jsonl").read_bytes().startswith(before)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    done = len(read_metrics(Path("run")))
    finish("resume", "run", "--training.macro-batches", str(done + 1))
    assert [line["macro_batch"] for line in read_metrics(Path("run"))] == list(range(1, done + 2))
