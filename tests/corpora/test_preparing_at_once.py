"""Processes that prepare the same corpus at the same time: one does it, the other waits for it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.adder import Adder
from cleangpt.data.dataset import TokenDataset
from tests.forked import Command

CORPUS = Adder(digits=2, train_samples=300, val_samples=20, test_samples=20)


def prepare_slowly() -> None:
    """Prepares it once there is a file `go`."""
    plain = Adder.prepare

    def slowly(self: Adder, *given: Any) -> Any:
        Path(f"began_{os.getpid()}").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        return plain(self, *given)

    Adder.prepare = slowly  # type: ignore[method-assign]
    store = prepare_dataset(CORPUS, Path("data"))
    assert isinstance(store, TokenDataset)
    store.verify()


def began() -> int:
    return len(list(Path().glob("began_*")))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_one_prepares_and_the_other_takes_what_it_made(workplace: Path) -> None:
    first = Command(prepare_slowly)
    wait_until(lambda: began() == 1)
    other = Command(prepare_slowly)
    wait_until(lambda: "\n" in other.stderr)
    assert "another process is preparing data/adder-" in other.stderr
    Path("go").touch()
    assert (first.wait(), other.wait()) == (0, 0)
    assert began() == 1
    assert isinstance(prepare_dataset(CORPUS, Path("data")), TokenDataset)
    assert [path.name for path in Path("data").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_one_that_is_killed_holds_nothing(workplace: Path) -> None:
    first = Command(prepare_slowly)
    wait_until(lambda: began() == 1)
    second = Command(prepare_slowly)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    wait_until(lambda: began() == 2)
    Path("go").touch()
    assert second.wait() == 0, second.stderr
