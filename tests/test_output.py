"""Whoever reads the output may leave at any time: work that has something to lose goes on."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import pytest

from cleangpt.output import discard, say
from cleangpt.screen import Screen
from tests.forked import PROJECT, run, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes")
EXPERIMENT = """
from cleangpt.config import *
from cleangpt.corpora.adder import Adder
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="small",
    corpus=Adder(digits=1, train_samples=40, val_samples=10, test_samples=10),
    data=DataConfig(seq_len=6, batch_size=4),
    model=GPTConfig(n_layers=1, n_heads=1, dim=8),
    optimizer=OptimizerConfig(lr=1e-2),
    training=TrainingConfig(macro_batches=3, batches_per_macro_batch=4, device="cpu"),
)
"""


def without_reader(streams: tuple[int, ...]) -> None:
    """Makes standard output (1) or errors (2) a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    for stream in streams:
        os.dup2(writing, stream)


def last(folder: str, file: str) -> dict[str, float]:
    return dict(json.loads(Path(folder, file).read_text().splitlines()[-1]))


@pytest.fixture
def own(workplace: Path) -> Path:
    path = workplace / "small.py"
    path.write_text(EXPERIMENT)
    return path


def test_a_run_that_nobody_watches_any_more_trains_to_its_end(own: Path) -> None:
    """From the corpus that it prepares to its last macro-batch."""
    command = start("train", "small.py", "--run-dir", "run", hook=functools.partial(without_reader, (1, 2)))
    assert command.wait() == 0
    assert last("run", "metrics.jsonl")["macro_batch"] == 3 and Path("run/snapshots/mb000003").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams", [(1,), *(pytest.param(those, marks=pytest.mark.torture) for those in ((2,), (1, 2)))], ids=str
)
def test_every_command_does_its_work_to_the_end(own: Path, streams: tuple[int, ...]) -> None:
    """From the first command, which prepares the corpus, to the last; one that trains again tells that it does."""
    hook = functools.partial(without_reader, streams)
    for words in (
        ["train", "small.py", "--run-dir", "run", "--optimizer.lr", "0.02"],
        ["train", "run/experiment.py", "--run-dir", "again"],
        ["resume", "run", "--training.macro-batches", "4"],
        ["evaluate", "run"],
        ["report", "run"],
        ["export", "run", "--out", "exported"],
        ["plan", "small.py", "--json", "plan.json"],
        ["tune", "small.py", "--steps", "4", "--rates", "0.01", "0.02", "--out", "tuned"],
        ["prepare", "adder", "--digits", "1", "--folder", "other"],
        ["sample", "run", "--max-new-tokens", "3"],
        ["list"],
    ):
        assert start(*words, hook=hook).wait() == 0, words
    assert [last(folder, "metrics.jsonl")["macro_batch"] for folder in ("run", "again")] == [4, 3]
    assert len(json.loads(Path("tuned/tune.json").read_text())["rates"]) == 2
    assert Path("run/evaluation.json").exists() and Path("run/report.html").exists() and Path("plan.json").exists()
    assert Path("exported/config.json").exists() and any(Path("other").glob("*/dataset.json"))


@pytest.mark.parametrize("streams", [(1,), (2,), (1, 2)], ids=str)
def test_mistakes_keep_their_exit_code(workplace: Path, streams: tuple[int, ...]) -> None:
    assert start("train", "nothing", hook=functools.partial(without_reader, streams)).wait() == 2


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_the_demo_trains_both_its_models_for_nobody(workplace: Path) -> None:
    assert start("demo", hook=functools.partial(without_reader, (1,))).wait(600) == 0
    assert len(list(Path("runs").glob("*/*/report.html"))) == 2


def test_a_full_disk_under_the_output_is_told_at_the_end(workplace: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    ended = start("list", hook=functools.partial(with_full_disk, 1))
    assert ended.wait() == 1
    assert ended.stderr.startswith("stopped: [Errno 28]") and "Traceback" not in ended.stderr


def with_full_disk(stream: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


def test_what_has_been_said_to_nobody_is_not_said_again() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as file:  # noqa: PTH123 - a file descriptor
        say("lost", file)
        screen = Screen(file=file)
        screen.print("lost as well")
        say("and this", file)
        discard(file)
    discard(None)


def test_a_screen_that_loses_its_reader_becomes_quiet_and_nothing_ends() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as file:  # noqa: PTH123 - a file descriptor
        screen = Screen(file=file)
        screen.print("lost")
        assert screen.quiet
        screen.print("lost as well")


def test_rich_is_only_used_through_a_screen() -> None:
    """Its own console ends the process with its reader."""
    package = PROJECT / "cleangpt"
    makers = [path for path in package.rglob("*.py") if re.search(r"\bConsole\(", path.read_text(encoding="utf-8"))]
    assert not makers


def test_an_output_that_is_read_is_whole(own: Path) -> None:
    printed = run("train", "small.py", "--run-dir", "run").stdout.splitlines()
    assert sum(line.startswith("macro-batch") for line in printed) == 3
    assert [line.split("  ", 1)[1] for line in Path("run/log.txt").read_text().splitlines()] == printed
