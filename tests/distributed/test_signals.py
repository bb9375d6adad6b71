"""What a signal does, whenever it comes: once, twice, while validating, while saving, without a terminal."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform == "win32":
    pytest.skip("signals of POSIX", allow_module_level=True)

import pty

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.corpora.adder import Adder
from cleangpt.distributed.signals import SAVE_SIGNAL, StopRequest, ignore_signal
from cleangpt.experiment import Experiment
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.trainer import Trainer
from tests.forked import start
from tests.losses import scaled

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]


TRAINED: list[Path] = []


@pytest.fixture
def unbroken(tiny: Build, trainer: Open, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, which nothing has interrupted; trained once."""
    if not TRAINED:
        trainer(tiny(run_dir="unbroken")).train()
        TRAINED.append(Path(shutil.move("unbroken", tmp_path_factory.mktemp("trained"))))
    return TRAINED[0]


def assert_ends_like(run: Path, other: Path) -> None:
    """The last snapshots are the same bit for bit, and each macro-batch is recorded once."""
    ours, theirs = (list_snapshots(folder / "snapshots")[0] for folder in (run, other))
    assert ours.name == theirs.name
    one, two = load_snapshot(ours), load_snapshot(theirs)
    assert all(torch.equal(tensor, two["model"][name]) for name, tensor in one["model"].items())
    assert one["position"]["samples"] == two["position"]["samples"]
    numbers = [[line["macro_batch"] for line in read_metrics(folder)] for folder in (run, other)]
    assert numbers[0] == numbers[1] == list(range(1, len(numbers[1]) + 1))


def after_step(trainer: Trainer, step: int, *signals: int) -> None:
    """Raises signals after a step."""
    original = trainer.step

    def then() -> None:
        original()
        if trainer.position.step == step:
            for number in signals:
                signal.raise_signal(number)

    trainer.step = then  # type: ignore[method-assign]


@pytest.mark.default(2)
@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGHUP,), (signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP),
        (signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGINT),
    ],
    ids=lambda numbers: "+".join(signal.Signals(number).name for number in numbers),
)  # fmt: skip
def test_signals_to_stop_save_once_and_the_run_goes_on_bit_for_bit(
    tiny: Build, trainer: Open, unbroken: Path, signals: tuple[int, ...]
) -> None:
    broken = trainer(tiny(run_dir="broken"))
    after_step(broken, 6, *signals)
    assert broken.train() == "interrupted"
    assert [path.name for path in list_snapshots(Path("broken/snapshots"))] == ["mb000001_b00002", "mb000001"]
    assert trainer(tiny(run_dir="broken")).train() == "finished"
    assert_ends_like(Path("broken"), unbroken)


@pytest.mark.slow
def test_sigusr1_saves_at_once_and_changes_nothing_else(tiny: Build, trainer: Open, unbroken: Path) -> None:
    run = trainer(tiny(run_dir="run"))
    after_step(run, 6, signal.SIGUSR1, signal.SIGUSR1)
    saved: list[str] = []
    save = run.saver.snapshots.save
    run.saver.snapshots.save = lambda name, state: (saved.append(name), save(name, state))[1]  # type: ignore[method-assign]
    assert run.train() == "finished"
    assert saved == ["mb000001", "mb000001_b00002", *(f"mb00000{number}" for number in range(2, 7))]
    assert "saving run/snapshots/mb000001_b00002" in Path("run/log.txt").read_text()
    assert_ends_like(Path("run"), unbroken)


@pytest.mark.slow
def test_what_sigusr1_saved_is_gone_on_from_after_a_crash(tiny: Build, trainer: Open, unbroken: Path) -> None:
    run = trainer(tiny(run_dir="run"))
    after_step(run, 6, signal.SIGUSR1)
    step = run.step
    run.step = lambda: step() if run.position.step < 7 else 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        run.train()
    resumed = trainer(tiny(run_dir="run"))
    assert resumed.position.step == 6
    resumed.train()
    assert_ends_like(Path("run"), unbroken)


@pytest.mark.default(1)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_validation(tiny: Build, trainer: Open, unbroken: Path, number: int) -> None:
    """One to stop cuts the validation short, which is done later; one to save lets it go on."""
    experiment = tiny(run_dir="broken", training__micro_batch_size=8)
    broken = trainer(experiment)
    raised = []

    def loud() -> float:
        if broken.position.macro_batch == 2 and not raised:
            raised.append(number)
            signal.raise_signal(number)
        return 1.0

    assert broken.validator is not None
    broken.validator.objective = scaled(broken.objective, loud)
    save, names = broken.saver.snapshots.save, []
    broken.saver.snapshots.save = lambda name, state: (names.append(name), save(name, state))[1]  # type: ignore[method-assign]
    assert broken.train() == ("finished" if number == signal.SIGUSR1 else "interrupted")
    assert raised and "mb000002_b00004" in names
    assert trainer(experiment).train() == "finished"
    assert_ends_like(Path("broken"), unbroken)


@pytest.mark.default(1)
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_saving(
    tiny: Build, trainer: Open, unbroken: Path, monkeypatch: pytest.MonkeyPatch, number: int, asynchronous: bool
) -> None:
    """The save under way is finished, and nothing half-written stays."""
    from cleangpt.checkpoints import tensor_files as shards

    save_file, calls = shards.save_file, []

    def interrupted(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None) -> None:
        calls.append(path.name)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        save_file(tensors, path, metadata)

    experiment = tiny(run_dir="broken", saving__async_snapshots=asynchronous)
    broken = trainer(experiment)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", interrupted)
        broken.train()
    assert not list(Path("broken").rglob("*.partial")) and not list(Path("broken").rglob("*.old"))
    assert trainer(experiment).train() == "finished"
    assert_ends_like(Path("broken"), unbroken)


def test_a_signal_while_the_trackers_close_does_not_end_the_process(tiny: Build, trainer: Open) -> None:
    """torchrun's own SIGTERM may come seconds after the first, when everything is saved."""
    run = trainer(tiny(run_dir="run", training__macro_batches=1))
    close = run.recorder.trackers.close

    def late(status: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(status)

    run.recorder.trackers.close = late  # type: ignore[method-assign]
    assert run.train() == "finished"


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    with ignore_signal(signal.SIGHUP):
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested is None
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_handlers_are_as_before_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with ignore_signal(SAVE_SIGNAL), StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def ask_while_preparing() -> None:
    """Has the process ask itself to save while it prepares its corpus."""
    plain = Adder.prepare

    def asked(self: Adder, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return plain(self, *given)

    Adder.prepare = asked  # type: ignore[method-assign]


def test_a_request_to_save_before_training_begins_ends_nothing(workplace: Path) -> None:
    """Its default is to end the process."""
    words = ["train", "adder", *SMALL, "--training.macro-batches", "1", "--run-dir", "run"]
    assert start(*words, hook=ask_while_preparing).wait() == 0
    assert len(read_metrics(Path("run"))) == 1


SMALL = ["--corpus.digits", "2", "--corpus.train-samples", "90", "--corpus.val-samples", "40", "--corpus.test-samples",
         "30", "--data.seq-len", "9", "--model.max-seq-len", "9", "--model.dim", "16", "--tracking.score-samples", "10",
         "--training.batches-per-macro-batch", "3", "--training.device", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_a_terminal_that_has_gone_is_no_loss(workplace: Path) -> None:
    """A process that leads the session of a terminal, which is closed: it gets SIGHUP, and cannot write any more."""
    command = [sys.executable, "-m", "cleangpt", "train", "adder", *SMALL, "--run-dir", "run",
               "--training.macro-batches", "100000"]  # fmt: skip
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    deadline = time.monotonic() + 60
    while not (Path("run/metrics.jsonl").exists() and len(read_metrics(Path("run"))) >= 2):
        assert time.monotonic() < deadline
        os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "to continue: cleangpt resume run" in Path("run/log.txt").read_text()
    assert load_snapshot(list_snapshots(Path("run/snapshots"))[0])["position"]["samples"] > 0


def test_a_signal_when_nobody_reads_the_messages_any_more_is_heeded(tiny: Build, trainer: Open) -> None:
    run = trainer(tiny(run_dir="run"))
    after_step(run, 2, signal.SIGTERM)
    before, (reading, writing) = os.dup(2), os.pipe()
    os.close(reading)
    os.dup2(writing, 2)
    try:
        assert run.train() == "interrupted"
    finally:
        os.dup2(before, 2)
        for handle in (before, writing):
            os.close(handle)
