"""Runs of several processes, on one machine and on two: who hangs or dies is named, the others end and start again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cleangpt.checkpoints.checkpoint import WEIGHTS, best_checkpoint
from cleangpt.checkpoints.snapshots import newest_snapshot
from cleangpt.files import read_json
from cleangpt.tracking.metrics import read_metrics
from tests.forked import Command, free_port, run, run_together, start, together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

EXPERIMENT = '''
import math, os, signal, time
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora import CORPORA
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import NextToken
from cleangpt.training.trainer import Trainer

RANK, RESTART = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
plain_step = Trainer.step

class Poisoned(NextToken):
    """A loss that is not a number."""

    def __call__(self, model, batch):
        loss = super().__call__(model, batch)
        return loss._replace(total=loss.total * math.nan)

def step(self):
    """Logs what it trains on and, where told to, breaks."""
    fault, at, rank = os.environ.get("FAULT", "none 0 0").split()
    here = self.position.step == int(at) and rank == RANK and RESTART == "0"
    if here and fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if here and fault == "freeze":
        self.model.blocks[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    if here and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if here and fault == "raise":
        raise RuntimeError("the disk is on fire")
    time.sleep(float(os.environ.get("PAUSE", "0")))
    if fault == "inf" and here:
        update = self.optimizer.step
        def spoilt(*given):
            gradient = self.optimizer.parameters[0].grad
            gradient.to_local().fill_(math.inf)
            self.optimizer.step = update
            return update(*given)
        self.optimizer.step = spoilt
    if fault == "nan" and rank == RANK and self.position.step >= int(at) and self.position.step % 100 != 5:
        objective = self.objective
        self.objective = Poisoned()
        plain_step(self)
        self.objective = objective
    else:
        take = self.source.next
        def logged():
            batch = take()
            with open(f"seen_{RANK}.txt", "a") as file:
                file.writelines(f"{self.position.step} {row}\\n" for row in batch.inputs["tokens"].tolist())
            return batch
        self.source.next = logged
        plain_step(self)
        self.source.next = take
    with open(f"weights_{RANK}.txt", "a") as file:
        total = sum(p.detach().double().abs().sum() for p in self.model.parameters())
        total = total.full_tensor() if hasattr(total, "full_tensor") else total
        scale = self.optimizer.scaler.get_scale()
        file.write(f"{self.position.step} {total.item()!r} {int(self.optimizer.skipped[0])} {scale}\\n")

Trainer.step = step
corpus = CORPORA["adder"](digits=2, train_samples=96, val_samples=40, test_samples=30)
experiment = Experiment(
    name="launched",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=8),
    model=GPTConfig(max_seq_len=corpus.row_length - 1, n_layers=2, n_heads=2, dim=16),
    optimizer=OptimizerConfig(lr=1e-2),
    training=TrainingConfig(macro_batches=3, batches_per_macro_batch=4, device="cpu", threads=1),
    tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
)
'''
TRAIN = ["train", "launched.py", "--run-dir", "run"]


@pytest.fixture(autouse=True)
def experiment(workplace: Path) -> None:
    (workplace / "launched.py").write_text(EXPERIMENT)


def torchrun(*options: str, words: tuple[str, ...] = (), **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "cleangpt", *TRAIN, *words]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=os.environ | environment)


def one_machine(processes: int, *words: str, **environment: str) -> tuple[int, str, float]:
    """Runs it to its end; returns exit code, errors and seconds."""
    began = time.monotonic()
    done = run_together(processes, *TRAIN, *words, **environment)
    return done.returncode, done.stderr, time.monotonic() - began


def stopped_lines(errors: str) -> dict[int, str]:
    """What each process said when it gave up, by rank."""
    lines = [line for line in errors.splitlines() if line.startswith("rank ") and ": stopped: " in line]
    return {int(line.split(":")[0][5:]): line.partition(": stopped: ")[2] for line in lines}


def children() -> str:
    """The command lines of the processes that train in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == Path.cwd() and int(entry.name) != os.getpid():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return "\n".join(found)


# One machine ---------------------------------------------------------------------------------------------------------


def assert_silent_one_is_named(code: int, errors: str, processes: int) -> None:
    """The last of the processes has stopped before step 5."""
    assert code == 1
    said = stopped_lines(errors)
    line = (
        f"no answer within 4 s at step 5 from process {processes - 1} (machine {socket.gethostname()}), "
        "last heard of at step 4"
    )
    assert line in said.values(), errors[-3000:]
    assert processes - 1 not in said and "commands/" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), [(2, "fsdp"), pytest.param(4, "ddp", marks=pytest.mark.torture)])
def test_a_process_that_hangs_is_named_with_its_machine_and_its_step(processes: int, strategy: str) -> None:
    words = ("--parallel.timeout", "4", "--parallel.strategy", strategy)
    code, errors, seconds = one_machine(processes, *words, FAULT=f"stop 5 {processes - 1}")
    assert_silent_one_is_named(code, errors, processes)
    assert seconds < 90


@pytest.mark.torture
def test_torchrun_ends_all_when_one_hangs() -> None:
    process = torchrun("--standalone", "--nproc_per_node=2", words=("--parallel.timeout", "4"), FAULT="stop 5 1")
    _, errors = process.communicate(timeout=90)
    assert_silent_one_is_named(process.returncode, errors, 2)
    assert children() == "" or not Path("/proc").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [pytest.param("hsdp --parallel.replicas 2", marks=pytest.mark.torture), "fsdp --parallel.tensor 2"]
)
def test_a_process_that_hangs_between_two_blocks_is_named_by_those_that_share_the_model(strategy: str) -> None:
    """They wait for it in groups of their own, whose time-outs are not those of the group of all."""
    words = ("--parallel.timeout", "4", "--parallel.strategy", *strategy.split())
    code, errors, seconds = one_machine(4, *words, FAULT="freeze 5 3")
    assert code == 1 and seconds < 110
    line = f"no answer within 4 s at step 5 from process 3 (machine {socket.gethostname()}), last heard of at step 5"
    assert line in stopped_lines(errors).values(), errors[-3000:]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_too() -> None:
    code, errors, seconds = one_machine(2, FAULT="kill 5 1")
    assert code == 1 and seconds < 60
    assert stopped_lines(errors)[0].startswith("lost the connection at step 5 to process 1 (machine ")


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_all() -> None:
    code, errors, seconds = one_machine(2, FAULT="raise 5 1")
    assert code == 1 and seconds < 60
    machine = socket.gethostname()
    assert stopped_lines(errors) == {0: f"process 1 (machine {machine}) failed at step 4: the disk is on fire"}


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_is_told_by_all_and_the_older_snapshot_stays() -> None:
    """They train to the end, for there may be room by then, and fail together where there is none."""
    full = EXPERIMENT + (
        "\nfrom cleangpt.checkpoints import tensor_files as shards\nsave_file = shards.save_file\n"
        "def full(tensors, path, metadata):\n    if RANK == '1' and 'mb000001' not in str(path):\n"
        "        raise OSError(28, 'No space left on device')\n    save_file(tensors, path, metadata)\n"
        "shards.save_file = full\n"
    )
    Path("launched.py").write_text(full)
    code, errors, _ = one_machine(2, "--saving.patience", "0")
    reason = "could not be saved: [Errno 28] No space left on device (process 1)"
    line = f"stopped: the last snapshot {reason}; resume continues from run/snapshots/mb000001"
    said = [words for words in errors.splitlines() if words.startswith("rank ")]
    assert code == 1 and said and {words.partition(": ")[2] for words in said} == {line}, errors[-3000:]
    assert f"snapshot mb000002 {reason}; earlier snapshots are intact" in Path("run/log.txt").read_text()
    assert newest_snapshot(Path("run/snapshots")) == (Path("run/snapshots/mb000001"), [])


@pytest.mark.slow
def test_the_others_wait_for_the_corpus_longer_than_the_timeout() -> None:
    slow = EXPERIMENT + (
        "\nfrom cleangpt.corpora.adder import Adder\nprepare = Adder.prepare\n"
        "def slowly(self, *given):\n    time.sleep(6)\n    return prepare(self, *given)\nAdder.prepare = slowly\n"
    )
    Path("launched.py").write_text(slow)
    code, errors, seconds = one_machine(2, "--parallel.timeout", "2")
    assert code == 0, errors[-3000:]
    assert seconds > 6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_on_one_process_makes_all_skip_the_step(strategy: str, precision: str) -> None:
    """Process 1 has a NaN in every step from the third on but the sixth, and six may be skipped in a row.

    With fp16, each of these steps halves the scale of the loss, on all processes alike.
    """
    words = ("--parallel.strategy", strategy, "--training.max-skipped-steps", "6", "--training.precision", precision)
    code, errors, _ = one_machine(2, *words, FAULT="nan 2 1")
    assert code == 1
    said = set(stopped_lines(errors).values())
    assert len(said) == 1, "torchrun may end one of them before it has spoken, but they cannot disagree"
    assert said.pop().startswith("6 steps in a row up to step 12 had a loss or gradient that is not")
    first, second = (Path(f"weights_{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second
    steps = [line.split() for line in first]
    skipped = [0, 0, 1, 2, 3, 3, *range(4, 10)]
    assert [int(line[2]) for line in steps] == skipped
    assert len({line[1] for line in steps[1:5]}) == 1 and steps[5][1] != steps[4][1]
    scales = [65536.0 * 0.5**number if precision == "fp16" else 1.0 for number in skipped]
    assert [float(line[3]) for line in steps] == scales


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_an_infinite_gradient_in_one_processs_part_makes_all_skip_the_step_and_halve_the_scale(strategy: str) -> None:
    words = ("--parallel.strategy", strategy, "--training.precision", "fp16")
    code, errors, _ = one_machine(2, *words, FAULT="inf 4 1")
    assert code == 0, errors[-3000:]
    first, second = (Path(f"weights_{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second
    steps = [line.split() for line in first]
    assert [int(line[2]) for line in steps] == [0] * 4 + [1] * 8
    assert [float(line[3]) for line in steps] == [65536.0] * 4 + [32768.0] * 8


@pytest.mark.slow
def test_all_stop_after_the_same_step_when_one_sees_that_too_many_were_skipped() -> None:
    """Within a macro-batch, where each process looks at the count only now and then, by the clock: at step 3 or 4."""
    code, errors, _ = one_machine(2, "--training.max-skipped-steps", "3", FAULT="nan 0 1", PAUSE="0.15")
    said = set(stopped_lines(errors).values())
    steps = [len(Path(f"weights_{rank}.txt").read_text().splitlines()) for rank in (0, 1)]
    assert steps in ([3, 3], [4, 4])
    assert code == 1 and len(said) == 1 and said.pop().startswith(f"3 steps in a row up to step {steps[0]} had a loss")


# Two machines --------------------------------------------------------------------------------------------------------


def machine(port: int, nodes: str = "2", **environment: str) -> "subprocess.Popen[str]":
    """The agent of one machine, with two processes."""
    return torchrun(
        f"--nnodes={nodes}", "--nproc_per_node=2", "--max-restarts=3", "--rdzv-id=test", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=join_timeout=60,last_call_timeout=2", **environment,
    )  # fmt: skip


def assert_like_one_process() -> None:
    """The run in `run` has the losses and weights of the same experiment on one process."""
    assert run(*TRAIN[:-1], "single", RANK="9").returncode == 0
    ours, theirs = read_metrics(Path("run")), read_metrics(Path("single"))
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs] == [32, 64, 96]
    for one, other in zip(ours, theirs, strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
    one, other = (load_file(best_checkpoint(Path(run)) / WEIGHTS) for run in ("run", "single"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=2e-4, rtol=2e-3)


@pytest.mark.slow
def test_two_machines_share_the_data_by_rank_and_learn_what_one_process_does() -> None:
    port = free_port()
    machines = [machine(port) for _ in range(2)]
    outcomes = [process.communicate(timeout=200)[1] for process in machines]
    assert [process.returncode for process in machines] == [0, 0], outcomes[0][-2000:] + outcomes[1][-2000:]
    seen = [Path(f"seen_{rank}.txt").read_text().splitlines() for rank in range(4)]
    assert [len(rows) for rows in seen] == [24] * 4
    assert len({row.split(" ", 1)[1] for rows in seen for row in rows}) == 96
    assert len(read_metrics(Path("run"))) == 3
    assert_like_one_process()


# Signals and time limits ---------------------------------------------------------------------------------------------


def wait_for_steps(rank: int, steps: int, process: "subprocess.Popen[str] | Command") -> None:
    """Waits until a process has made some steps."""
    path, deadline = Path(f"weights_{rank}.txt"), time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_a_hangup_of_torchrun_saves_all_after_the_same_step() -> None:
    process = torchrun("--standalone", "--nproc_per_node=2", words=("--training.macro-batches", "500"), PAUSE="0.01")
    wait_for_steps(1, 6, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert read_json(Path("run/status.json")) == {"status": "interrupted", "reason": "signal"}
    assert newest_snapshot(Path("run/snapshots"))[0] is not None
    first, second = (Path(f"weights_{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second


@pytest.mark.slow
def test_a_request_to_save_to_any_process_makes_all_save_and_go_on() -> None:
    words = [*TRAIN, "--training.macro-batches", "12"]
    first, second = (start(*words, environment={**rank, "PAUSE": "0.05"}) for rank in together(2))
    wait_for_steps(1, 6, second)
    second.send_signal(signal.SIGUSR1)
    assert (first.wait(), second.wait()) == (0, 0), first.stderr[-3000:] + second.stderr[-3000:]
    assert Path("run/log.txt").read_text().count("saving run/snapshots/mb") == 1
    assert len(read_metrics(Path("run"))) == 12
