"""Which folder a run is begun in, and which one is found again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cleangpt.config import Experiment
from cleangpt.training.run import open_run, resolve

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
