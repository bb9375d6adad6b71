"""A launch that must end in time: what a limit means, how much is kept back for saving, and that the run ends whole."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.checkpoints.run_folder import open_run
from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.commands import main
from cleangpt.corpora import prepare
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.tracking.metrics import read_metrics
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training import deadline
from cleangpt.training.build import build_trainer
from cleangpt.training.deadline import SPARE, Deadline, read_time_limit
from cleangpt.training.launch import resolve
from cleangpt.training.trainer import Trainer

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("0:08", 8), ("02:00:00", 7200), ("00:00:01", 1), ("100:00:00", 360_000),
        ("1-0", 86_400), ("2-12", 216_000), ("0-01:30", 5400), ("1-01:01:01", 90_061),
    ],
)  # fmt: skip
def test_a_limit_is_read_as_slurm_writes_it(text: str, seconds: int) -> None:
    """The forms of the option --time in the manual of sbatch, where a number alone is minutes."""
    assert read_time_limit(text, 1000.0) == 1000.0 + seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "-5", "1h", "1.5", "1:2:3:4", "1-", "1-2:3:4:5", "::", "١"])
def test_what_is_no_limit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^--time-limit is .*; allowed: more than 0 as MINUTES, .*, or slurm$"):
        read_time_limit(text, 0.0)


def test_the_end_of_a_slurm_job_is_taken_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME is not set"):
        read_time_limit("slurm", 0.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    assert read_time_limit("slurm", 5.0) == 1_790_000_000.0


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(deadline.time, "time", lambda: self.now)
        monkeypatch.setattr(deadline.time, "monotonic", lambda: self.now)


@given(
    pieces=st.lists(st.floats(0.01, 20.0), min_size=1, max_size=30),
    save=st.floats(0.1, 50.0),
    limit=st.floats(60.0, 2000.0),
)
def test_a_run_whose_work_takes_no_longer_than_before_has_saved_in_time(
    pieces: list[float], save: float, limit: float
) -> None:
    """One macro-batch after another of the same pieces of work; at the end a save under way, and the last one."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        until = Deadline(clock.now + limit, save)
        for macro_batch in itertools.count():
            near = False
            for piece in pieces:
                if near := until.near(save if macro_batch else 0.0):
                    break
                clock.now += piece
            if near:
                break
            until.begin_macro_batch()
        began = sum(pieces) + 2 * save + SPARE
        assert clock.now + 2 * save <= 1000 + limit or limit < began


def test_a_slow_first_macro_batch_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    until = Deadline(5000.0, 1.0)
    clock.now += 300
    until.near(2.0)
    assert until.reserve(2.0) == 300 + 4 + SPARE
    until.begin_macro_batch()
    assert until.reserve(2.0) == 300 + 4 + SPARE
    until.begin_macro_batch()
    clock.now += 3
    until.near(2.0)
    assert until.reserve(2.0) == 3 + 4 + SPARE


def test_without_a_limit_it_is_never_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    until = Deadline(None, 1e9)
    clock.now += 1e9
    assert not until.near(1e9) and until.left == math.inf


@pytest.mark.slow
def test_a_run_out_of_time_saves_and_goes_on_later_bit_for_bit(tiny: Build, trainer: Open) -> None:
    unbroken = trainer(tiny(run_dir="unbroken"))
    unbroken.train()
    experiment = tiny(run_dir="broken")
    store = prepare(experiment.corpus, Path(experiment.data.folder))
    experiment = resolve(experiment, store.vocab_size)
    run = open_run(experiment, None, [])
    broken = build_trainer(experiment, run, store, ProgressBar(run, progress=False), end=time.time() + 3600)
    step = broken.step

    def until_the_tenth() -> None:
        step()
        if broken.position.step == 10:
            broken.stopping.deadline.end = time.time() + 1

    broken.step = until_the_tenth  # type: ignore[method-assign]
    assert broken.train() == "interrupted"
    assert broken.position.step == 10
    assert "s before the time limit: saving" in (run / "log.txt").read_text()
    assert broken.saver.snapshots.longest_save > 0
    resumed = trainer(tiny(run_dir="broken"))
    assert resumed.train() == "finished"
    ours, theirs = (load_snapshot(list_snapshots(Path(name) / "snapshots")[0]) for name in ("broken", "unbroken"))
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
    assert [line["macro_batch"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


ADDER = ["train", "adder", "--corpus.digits", "2", "--data.seq-len", "9", "--model.max-seq-len", "9",
         "--corpus.train-samples", "90", "--corpus.val-samples", "40", "--corpus.test-samples", "30",
         "--model.dim", "16", "--tracking.no-progress", "--tracking.score-samples", "10", "--training.device", "cpu",
         "--training.macro-batches", "2", "--training.batches-per-macro-batch", "3"]  # fmt: skip


@pytest.mark.slow
def test_the_limit_is_of_the_launch_and_not_of_the_experiment(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ADDER, "--run-dir", "run", "--time-limit", "0:01"]) == 0
    assert "interrupted and saved" in Path("run/log.txt").read_text()
    assert "time_limit" not in Path("run/experiment.json").read_text()
    assert main(["resume", "run", "--time-limit", "1-00:00:00"]) == 0
    assert len(read_metrics(Path("run"))) == 2
    assert main(["train", "run/experiment.py", "--run-dir", "again"]) == 0
    assert len(read_metrics(Path("again"))) == 2
    assert main(["resume", "run", "--time-limit", "soon"]) == 2
    assert "error: --time-limit is 'soon'; allowed: more than 0 as MINUTES" in capsys.readouterr().err


def test_a_script_can_tell_a_run_that_must_go_on_from_one_that_has_ended(workplace: Path) -> None:
    from cleangpt.files import read_json

    main([*ADDER, "--run-dir", "run", "--time-limit", "0:01"])
    assert read_json(Path("run/status.json")) == {"status": "interrupted", "reason": "time limit"}
    main(["resume", "run"])
    assert read_json(Path("run/status.json")) == {"status": "finished", "reason": None}
