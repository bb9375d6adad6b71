"""Snapshots of a run: saved where it stands, once, and found again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cleangpt.checkpoints import tensor_files
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.errors import DivergedError, RunFailedError, UserError
from cleangpt.experiment import Experiment
from cleangpt.files import fsync_files, read_json, write_json
from cleangpt.training import saving
from cleangpt.training.trainer import Trainer

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]


def names(run: str) -> list[str]:
    return [path.name for path in list_snapshots(Path(run) / "snapshots")]


def test_a_snapshot_is_named_by_where_the_run_stands_and_saved_once(tiny: Build, trainer: Open) -> None:
    run = trainer(tiny(run_dir="run", saving__keep_snapshots=5))
    checked: list[int] = []

    def check() -> None:
        checked.append(run.position.step)

    for _ in range(2):
        run.step()
        run.saver.save(check)
        run.saver.save(check)
    run.saver.snapshots.close()
    run.source.close()
    assert names("run") == ["mb000000_b00002", "mb000000_b00001"]
    assert checked == [1, 2], "nothing is checked or written where a snapshot of this step exists"
    again = trainer(tiny(run_dir="run", saving__keep_snapshots=5))
    assert (again.position.step, again.saver.saved) == (2, "mb000000_b00002")
    again.saver.save(check)
    assert checked == [1, 2], "not that from which the run was resumed either"


def test_what_does_not_pass_the_check_is_not_saved(tiny: Build, trainer: Open) -> None:
    run = trainer(tiny(run_dir="run"))
    run.step()
    with torch.no_grad():
        run.model.final_norm.weight[0] = float("nan")
    with pytest.raises(DivergedError, match=r"final_norm.weight is not finite after step 1; there is no snapshot yet"):
        run.saver.save(run.recovery.check_weights)
    run.source.close()
    assert names("run") == []


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A disk without room, until it is undone."""

    def refuse(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", refuse)
        yield patch


def test_one_that_the_disk_refuses_is_made_up_for_by_the_next(
    tiny: Build, trainer: Open, full: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny(run_dir="run"))
    run.step()
    run.saver.save(lambda: None)
    assert run.saver.snapshots.pending is not None and "No space left" in run.saver.snapshots.pending.result()
    full.undo()
    run.saver.save(lambda: None)
    run.saver.snapshots.close()
    run.source.close()
    assert names("run") == ["mb000000_b00001"]


def test_the_last_one_is_tried_again_until_patience_runs_out(
    tiny: Build, trainer: Open, full: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(saving, "time", SimpleNamespace(sleep=pauses.append))
    run = trainer(tiny(run_dir="run", saving__patience=20))
    run.step()
    with pytest.raises(
        RunFailedError, match=r"could not be saved: .*No space left.*; resume starts from the beginning"
    ):
        run.saver.save_last(lambda: None)
    assert pauses == [saving.PAUSE] * 2
    full.undo()
    run.saver.save_last(lambda: None)
    run.source.close()
    assert names("run") == ["mb000000_b00001"]


def test_a_snapshot_of_an_older_format_is_refused_in_one_line(tiny: Build, trainer: Open) -> None:
    trainer(tiny(run_dir="run", training__macro_batches=1)).train()
    (snapshot,) = list_snapshots(Path("run/snapshots"))
    write_json(snapshot / "state.json", read_json(snapshot / "state.json") | {"format": 2})
    manifest = read_json(snapshot / "manifest.json")
    write_json(snapshot / "manifest.json", fsync_files([snapshot / name for name in manifest]))
    with pytest.raises(UserError, match=r"^run/snapshots/mb000001 has snapshot format 2; this version reads \d; .*$"):
        trainer(tiny(run_dir="run", training__macro_batches=1))


def test_where_every_snapshot_is_corrupt_the_run_is_not_begun_again_over_it(tiny: Build, trainer: Open) -> None:
    trainer(tiny(run_dir="run")).train()
    for path in list_snapshots(Path("run/snapshots")):
        (path / "index.json").unlink()
    with pytest.raises(UserError, match="every snapshot in run/snapshots is corrupt, and restarting would overwrite"):
        trainer(tiny(run_dir="run"))
    assert names("run") == ["mb000006", "mb000005"]
