"""Which folder a run is begun in, and which one is found again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cleangpt.config import Experiment
from cleangpt.errors import UserError
from cleangpt.training.run import check_folder, open_run, read_experiment, resolve

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
