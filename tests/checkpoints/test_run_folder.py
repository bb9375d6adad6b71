"""Which folder a run is begun in, and which one is found again."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cleangpt.checkpoints.lock import lock_run
from cleangpt.checkpoints.run_folder import (
    EXPERIMENT,
    check_data,
    check_folder,
    check_registered,
    experiment_json,
    find_run,
    open_run,
    read_experiment,
    record_run,
)
from cleangpt.corpora import prepare
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.files import write_json
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import NextToken
from cleangpt.training.launch import resolve

Build = Callable[..., Experiment]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Sets what torchrun tells its processes: the launch, and how often it has restarted them."""

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
    with lock_run(Path("run")), pytest.raises(UserError, match=r"run is being trained by (another )?process"):
        open_run(experiment, None, [])
    assert {path.name for path in Path("run").iterdir()} <= {"lock"}, "older versions of filelock remove it"
    check_folder(experiment)
    open_run(experiment, None, [])


def test_a_run_goes_on_only_with_the_tokens_that_it_began_with(tiny: Build) -> None:
    experiment = resolve(tiny(run_dir="run"), 16)
    store = prepare(experiment.corpus, Path("data"))
    run = open_run(experiment, None, [])
    record_run(run, experiment, check_data(run, store), None, [])
    assert check_data(run, store).keys() == {""}
    with (store.sources[0].dataset.folder / "train_00000.bin").open("r+b") as file:
        file.write(b"\7")
    with pytest.raises(UserError, match=r"train_00000.bin has changed since it was prepared"):
        check_data(Path("run"), store)
    prepare(experiment.corpus, Path("data"), again=True)
    check_data(Path("run"), prepare(experiment.corpus, Path("data")))


def copied(run: Path) -> None:
    """Another folder beside it gets every file, with the times of now."""
    shutil.copytree(run, run.with_name("copy"), copy_function=shutil.copyfile)


def touched(run: Path) -> None:
    for path in (run, *run.rglob("*")):
        os.utime(path)


def evaluated(run: Path) -> None:
    (run / "evaluation.json").write_text("{}")


def moved(run: Path) -> None:
    run.rename(run.with_name("zzz"))


@pytest.mark.default(4)
@pytest.mark.parametrize("what", [copied, touched, evaluated, moved])
@pytest.mark.parametrize("older", [1, 0, 9])
def test_the_newest_run_is_the_one_that_began_last_whatever_was_done_to_older_ones(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, what: Callable[[Path], None], older: int
) -> None:
    """By its own record: eleven runs, some begun within the same second, their clock set to winter time in between."""
    experiment = resolve(tiny(), 16)
    times = ["2026-10-25T02:59:59+0200", *9 * ["2026-10-25T02:10:00+0100"], "2026-10-25T02:10:00+0100"]
    runs = []
    for began in times:
        with monkeypatch.context() as then:  # the clock is everybody's: `datetime.strptime` asks it too
            then.setattr("cleangpt.checkpoints.run_folder.time.strftime", lambda form, began=began: (
                began if "z" in form else began[:19].replace("T", "_").replace(":", "")))  # fmt: skip
            runs.append(open_run(experiment, None, []))
    assert find_run("tiny") == find_run("runs/tiny") == runs[-1]
    time.sleep(0.02)
    what(runs[older])
    assert find_run("tiny") == find_run("runs/tiny") == runs[-1]


def test_a_run_without_a_time_counts_as_old(tiny: Build) -> None:
    experiment = resolve(tiny(), 16)
    first = open_run(experiment, None, [])
    second = first.with_name("hand_made")
    shutil.copytree(first, second)
    for text in ("{}", '{"started": "yesterday"}', "nothing"):
        (second / "environment.json").write_text(text)
        assert find_run("tiny") == first


@dataclass(frozen=True, kw_only=True)
class Unregistered(NextToken):
    """An objective without its line in OBJECTIVES."""


@dataclass(frozen=True, kw_only=True)
class UnregisteredGPT(GPTConfig):
    """A model without its line in MODELS."""


def test_what_could_not_be_read_back_is_refused(tiny: Build) -> None:
    """It used to train, and then nothing could resume or evaluate it."""
    check_registered(tiny())
    with pytest.raises(UserError, match=r"objective is a Unregistered, which is not registered: .* to OBJECTIVES"):
        check_registered(tiny(objective=Unregistered()))
    with pytest.raises(UserError, match=r"model is a UnregisteredGPT, which is not registered: .* to MODELS"):
        check_registered(tiny(model=UnregisteredGPT(n_layers=1, n_heads=1, dim=8)))


@pytest.mark.parametrize(
    ("part", "field", "value", "line"),
    [
        ("corpus", "questions", 6, r"corpus\.questions is not a field of"),
        ("model", "questions", 6, r"model\.questions is not a field of"),
        ("optimizer", "betas", 0.5, r"optimizer\.betas is 0\.5; allowed"),
    ],
)
def test_a_run_of_another_version_says_what_to_do(part: str, field: str, value: object, line: str, tiny: Build) -> None:
    run = open_run(resolve(tiny(), 16), None, [])
    tree = experiment_json(tiny())
    tree[part][field] = value
    write_json(run / EXPERIMENT, tree)
    with pytest.raises(UserError, match=rf"experiment\.json \(if another version .* init_from is this one\): {line}"):
        read_experiment(run)


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
