"""Processes that prepare the same corpus at the same time: one does it, the other waits for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.adder import Adder
from cleangpt.data.dataset import TokenDataset

CORPUS = Adder(digits=2, train_samples=300, val_samples=20, test_samples=20)
SLOW = """
import os, sys, time
from pathlib import Path
from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.adder import Adder

plain = Adder.prepare

def slowly(self, folder, console):
    Path(f"began_{os.getpid()}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return plain(self, folder, console)

Adder.prepare = slowly
store = prepare_dataset(Adder(digits=2, train_samples=300, val_samples=20, test_samples=20), Path("data"))
store.verify()
"""


def start() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", SLOW], stderr=subprocess.PIPE, text=True)


def began() -> int:
    return len(list(Path().glob("began_*")))


def wait_until(number: int) -> None:
    deadline = time.monotonic() + 60
    while began() < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_prepares_and_the_other_takes_what_it_made(workplace: Path) -> None:
    first = start()
    wait_until(1)
    other = start()
    assert other.stderr is not None
    assert "another process is preparing data/adder-" in other.stderr.readline()
    Path("go").touch()
    for process in (first, other):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert began() == 1
    assert isinstance(prepare_dataset(CORPUS, Path("data")), TokenDataset)
    assert [path.name for path in Path("data").iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_one_that_is_killed_holds_nothing(workplace: Path) -> None:
    first = start()
    wait_until(1)
    second = start()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    wait_until(2)
    Path("go").touch()
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
