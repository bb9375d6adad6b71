"""Which folder a run is begun in, and which one is found again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cleangpt.checkpoints.run_folder import check_data, check_folder, lock_run, open_run, read_experiment
from cleangpt.corpora import prepare
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.training.launch import resolve

Build = Callable[..., Experiment]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Sets what torchrun tells its processes: the launch, and how often it has started them anew."""

    def launch(name: str, restarts: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))

    return launch


def test_a_restart_goes_on_with_the_run_of_its_own_launch(tiny: Build, launched: Callable[[str, int], None]) -> None:
    experiment = resolve(tiny(), 16)
    launched("first", 0)
    first = open_run(experiment, None, [])
    launched("second", 0)
    second = open_run(experiment, None, [])
    assert first != second
    for name, run in (("first", first), ("second", second)):
        launched(name, 1)
        assert open_run(experiment, None, []) == run


def test_a_restart_of_a_launch_that_died_before_it_began_a_run_begins_one(
    tiny: Build, launched: Callable[[str, int], None]
) -> None:
    """And leaves alone the run, finished perhaps, that another launch of the same experiment has left."""
    experiment = resolve(tiny(), 16)
    launched("second", 1)
    begun = open_run(experiment, None, [])
    launched("third", 1)
    assert open_run(experiment, None, []) != begun
    assert len(list(Path("runs/tiny").iterdir())) == 2


def test_runs_begun_at_the_same_moment_get_folders_of_their_own(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the folder of the other before it makes its own."""
    experiment = resolve(tiny(), 16)
    monkeypatch.setattr("cleangpt.checkpoints.run_folder.time.strftime", lambda *_: "now")
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert open_run(experiment, None, []) != open_run(experiment, None, [])


def test_a_run_that_another_process_begins_is_not_written_to(tiny: Build) -> None:
    experiment = resolve(tiny(run_dir="run"), 16)
    Path("run").mkdir()
    with lock_run(Path("run")), pytest.raises(UserError, match="run is being trained by another process"):
        open_run(experiment, None, [])
    assert {path.name for path in Path("run").iterdir()} <= {"lock"}, "older versions of filelock remove it"
    check_folder(experiment)
    open_run(experiment, None, [])


def test_a_run_goes_on_only_with_the_tokens_that_it_began_with(tiny: Build) -> None:
    experiment = tiny()
    store = prepare(experiment.corpus, Path("data"))
    Path("run").mkdir()
    check_data(Path("run"), store)
    check_data(Path("run"), store)
    with (store.sources[0].dataset.folder / "train_00000.bin").open("r+b") as file:
        file.write(b"\7")
    with pytest.raises(UserError, match=r"train_00000.bin has changed since it was prepared"):
        check_data(Path("run"), store)
    prepare(experiment.corpus, Path("data"), again=True)
    check_data(Path("run"), prepare(experiment.corpus, Path("data")))


@pytest.mark.parametrize("there", [["experiment.py"], ["experiment.py", "environment.json", "experiment.json.partial"]])
def test_a_run_killed_while_it_began_is_begun_again(tiny: Build, there: list[str]) -> None:
    """The same command, started again by a scheduler, used to be refused."""
    Path("run").mkdir()
    for name in there:
        (Path("run") / name).write_text("half")
    experiment = resolve(tiny(run_dir="run"), 16)
    check_folder(experiment)
    run = open_run(experiment, None, [])
    assert read_experiment(run) == experiment


def test_a_folder_of_something_else_is_refused(tiny: Build) -> None:
    Path("run").mkdir()
    (Path("run") / "thesis.tex").touch()
    with pytest.raises(UserError, match="run_dir is 'run', which holds something else; give another folder"):
        check_folder(tiny(run_dir="run"))
