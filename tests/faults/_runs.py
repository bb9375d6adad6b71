"""Runs of the command line in forked processes, so that hundreds can be killed in a minute or two."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot, newest_snapshot
from cleangpt.files import find_corruption, read_json
from cleangpt.tracking.metrics import read_metrics
from tests import forked
from tests.forked import Command, Hook, together

OUTPUT = "output.txt"
TRAIN = ("train", "victim.py", "--run-dir", "run")
"""What a scheduler starts again after a crash."""
EXPERIMENT = """
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="victim",
    corpus=Adder(digits=1, train_samples=40, val_samples=16, test_samples=8),
    data=DataConfig(seq_len=6, batch_size=4),
    model=GPTConfig(max_seq_len=6, n_layers=1, n_heads=2, dim=8, dropout=0.1),
    optimizer=OptimizerConfig(lr=1e-2),
    schedule=ScheduleConfig(batch_size=Schedule(shape="linear", initial=0.5)),
    training=TrainingConfig(macro_batches=3, batches_per_macro_batch=4, accumulation=2, device="cpu", threads=1),
    saving=SavingConfig(keep_best=2, patience=0),
    tracking=TrackingConfig(sample_tokens=2, score_samples=2),
)
"""


def start(folder: Path, *words: str, hook: Hook | None = None, environment: Mapping[str, str] | None = None) -> Command:
    """Starts `cleangpt words` in `folder`; what it prints is appended to output.txt there."""
    return forked.start(*words, folder=folder, hook=hook, environment=environment, append_to=OUTPUT)


def finish(process: Command, seconds: float = 60) -> int:
    """The exit code of a process, negative for a signal; one that does not end is killed, and that is an error."""
    return process.wait(seconds)


def run(folder: Path, *words: str, hook: Hook | None = None) -> int:
    """Runs a command line to its end; returns the exit code."""
    return finish(start(folder, *words, hook=hook))


# The victim ----------------------------------------------------------------------------------------------------------


def victim(folder: Path, text: str = EXPERIMENT) -> None:
    """Puts the experiment of `text` into `folder` as victim.py, and its prepared corpus."""
    shutil.copytree(unbroken(text) / "data", folder / "data")
    (folder / "victim.py").write_text(text, encoding="utf-8")


@functools.cache
def unbroken(text: str = EXPERIMENT, processes: int = 1) -> Path:
    """A folder in which the experiment has been trained to its end, in `run`; made once."""
    folder = Path(tempfile.mkdtemp(prefix="unbroken_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "victim.py").write_text(text, encoding="utf-8")
    running = start_two(folder, *TRAIN) if processes == 2 else [start(folder, *TRAIN)]
    assert [finish(process) for process in running] == [0] * processes, output(folder)
    return folder


def start_two(folder: Path, *words: str, hooks: Sequence[Hook | None] = (None, None)) -> list[Command]:
    """Starts two processes that train together, each with a hook of its own."""
    return [
        start(folder, *words, hook=hook, environment=environment)
        for hook, environment in zip(hooks, together(2), strict=True)
    ]


def run_two(folder: Path, *words: str, hooks: Sequence[Hook | None] = (None, None)) -> list[int]:
    """Runs two processes that train together to their ends; returns their exit codes."""
    return [finish(process) for process in start_two(folder, *words, hooks=hooks)]


def output(folder: Path) -> str:
    """What the runs in a folder have printed."""
    path = folder / OUTPUT
    return path.read_text(encoding="utf-8") if path.exists() else ""


def check_whole(folder: Path, reference: Path | None = None, checkpoints: bool = True) -> None:
    """Asserts that nothing of the run in `folder` was lost.

    Its weights, moments, position, generators and metrics are those of the `reference`, bit for bit; every macro-batch
    stands in metrics.jsonl once; so are the checkpoints, unless the disk had no room for them; nothing lies around;
    nobody has seen a traceback.
    """
    ours, theirs = folder / "run", (reference or unbroken()) / "run"
    assert "Traceback" not in output(folder), output(folder)
    one, two = newest_state(ours), newest_state(theirs)
    if not checkpoints:
        for state in (one, two):
            del state["checkpoints"], state["trackers"]  # lines that waited for room are in the files
    assert (difference := differing(one, two)) == "", difference
    numbers = [row["macro_batch"] for row in read_metrics(ours)]
    assert numbers == [row["macro_batch"] for row in read_metrics(theirs)], f"metrics.jsonl has {numbers}"
    rows = ([untimed(row) for row in read_metrics(run)] for run in (ours, theirs))
    assert (difference := differing(*rows)) == "", difference
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text(), "samples.jsonl differs"
    if checkpoints:
        assert (difference := differing(checkpoint_sums(ours), checkpoint_sums(theirs))) == "", difference
    for path in list_snapshots(ours / "snapshots"):
        assert find_corruption(path) == "", f"{path}: {find_corruption(path)}"
    assert (strays := remains(ours)) == [], strays


def newest_state(run: Path) -> dict[str, Any]:
    """The state in the newest snapshot, without the times."""
    path, complaints = newest_snapshot(run / "snapshots")
    assert path is not None and not complaints and path == list_snapshots(run / "snapshots")[0], complaints
    state = load_snapshot(path)
    del state["position"]["time_trained"], state["meter"]
    return state


def checkpoint_sums(run: Path) -> dict[str, Any]:
    """The checksums of every checkpoint of a run, by name; those of the index are the same."""
    folders = {path.name: read_json(path / "manifest.json") for path in (run / "checkpoints").glob("val*")}
    index = [entry["name"] for entry in read_json(run / "checkpoints" / "index.json")["checkpoints"]]
    assert sorted(index) == sorted(folders), f"the index has {index}, the folder {sorted(folders)}"
    return folders


def remains(run: Path) -> list[str]:
    """What an interrupted save has left behind."""
    return [str(path) for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a macro-batch that do not depend on the clock or the machine's memory."""
    timed = ("tokens_per_second", "step_time", "data_wait_share", "mfu", "time_trained", "peak_memory")
    return {name: value for name, value in row.items() if name not in timed}


def differing(one: Any, two: Any, path: str = "") -> str:
    """Where two trees of dicts, lists and tensors are not the same, bit for bit; empty where they are."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        return "" if same else f"{path} is another tensor"
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return f"{path}: {sorted(one.keys() ^ two.keys())} are in one of them"
        return next(filter(None, (differing(one[key], two[key], f"{path}/{key}") for key in one)), "")
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return next(filter(None, (differing(one[i], two[i], f"{path}/{i}") for i in range(len(one)))), "")
    return "" if one == two else f"{path} is {one!r} and {two!r}"
