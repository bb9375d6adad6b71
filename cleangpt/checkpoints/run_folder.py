"""The run folder: its files, its lock, and how to find a run or a checkpoint."""

import contextlib
import itertools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from cleangpt import __version__
from cleangpt.checkpoints.checkpoint import CONFIG, best_checkpoint
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.corpora import CORPORA
from cleangpt.corpora.mixture import Mixture
from cleangpt.data.mixing import MixedDataset
from cleangpt.distributed.device import choose_device, describe_device
from cleangpt.distributed.processes import world_size
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.files import PARTIAL, read_json, write_bytes, write_json
from cleangpt.hub import is_huggingface
from cleangpt.models import build_model, model_kinds
from cleangpt.models.meta import on_meta
from cleangpt.objectives import OBJECTIVES
from cleangpt.validation import flatten, from_json, to_json

# Fields that cannot change when a run is resumed.
FIXED_FIELDS = {
    *("name", "data.seq_len", "data.batch_size", "training.batches_per_macro_batch", "training.seed", "objective"),
    *("rollouts.prompts", "rollouts.completions", "rollouts.passes"),
    "fine_tuning.freeze",
}


FIXED_PREFIXES = ("corpus.", "model.", "fine_tuning.lora.")


EXPERIMENT, EXPERIMENT_FILE, ENVIRONMENT = "experiment.json", "experiment.py", "environment.json"


LOCK = "lock"


STATUS, STORES = "status.json", "stores.json"


LAUNCH_ID = "TORCHELASTIC_RUN_ID"
"""The environment variable in which torchrun identifies a launch; the same after restarts."""


def kinds() -> dict[str, type]:
    """All registered classes that an experiment's JSON may refer to by name."""
    return {**model_kinds(), **CORPORA, "mixture": Mixture, **OBJECTIVES}


def experiment_json(experiment: Experiment) -> dict[str, Any]:
    """Every field of an experiment, resolved, as JSON."""
    return to_json(experiment, kinds())


def open_run(experiment: Experiment, source: Path | None, overrides: Sequence[str]) -> Path:
    """Opens the run in `experiment.run_dir`, or creates one; a new run gets its experiment and environment.

    Args:
        experiment: with every field resolved.
        source: the experiment's Python file, copied into the run; None: not copied.
        overrides: the command-line arguments after the experiment, saved so that the run can be repeated.

    Raises:
        UserError: the folder holds a run of another experiment, or another process is training it.
    """
    wanted = experiment_json(experiment)
    if experiment.run_dir is not None:
        run = Path(experiment.run_dir)
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = _run_before_restart(experiment.name) or _new_folder(experiment.name)
    with lock_run(run):
        if (run / EXPERIMENT).is_file():
            _check_same(run, read_json(run / EXPERIMENT), wanted)
            return run
        if source is not None:
            write_bytes(run / EXPERIMENT_FILE, source.read_bytes())
        write_json(run / ENVIRONMENT, environment(experiment, overrides))
        write_json(run / EXPERIMENT, wanted)
    return run


def check_folder(experiment: Experiment) -> None:
    """Refuses a folder that is neither a run nor one that was killed while being created.

    Raises:
        UserError: `experiment.run_dir` is a file, or a folder with other content.
    """
    run = Path(experiment.run_dir) if experiment.run_dir is not None else None
    if run is None or not run.exists() or (run / EXPERIMENT).is_file():
        return
    expected = {name + end for name in (EXPERIMENT_FILE, ENVIRONMENT, EXPERIMENT) for end in ("", PARTIAL)} | {LOCK}
    if run.is_file() or {path.name for path in run.iterdir()} - expected:
        raise UserError(f"run_dir is {str(run)!r}, which holds something else; give another folder")


def find_run(text: str) -> Path:
    """Finds a run by its folder, by a folder of runs (the newest one), or by an experiment's name.

    Raises:
        UserError: there is no such run.
    """
    for path in (Path(text), Path("runs") / text):
        if (path / EXPERIMENT).is_file():
            return path
        inside = sorted(path.glob(f"*/{EXPERIMENT}"), key=lambda found: found.stat().st_mtime)
        if inside:
            return inside[-1].parent
    raise UserError(f"{text} is not a run; allowed: a folder with an {EXPERIMENT}, or a name in runs/")


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Locks a run against other processes; the system releases the lock of a process that dies.

    Raises:
        UserError: another process is training it.
    """
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run} is being trained by another process; wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()


def write_status(run: Path, status: str | None, reason: str | None = None) -> None:
    """Writes how training ended, for scripts that decide whether to restart it; None: it is running."""
    (run / STATUS).unlink(missing_ok=True)
    if status is not None:
        write_json(run / STATUS, {"status": status, "reason": reason})


def find_checkpoint(text: str) -> Path:
    """Finds a checkpoint by its folder, or the best one of the run that `find_run` finds."""
    return Path(text) if (Path(text) / CONFIG).is_file() else best_checkpoint(find_run(text))


def find_moments(text: str) -> Path:
    """The snapshots folder of a run, from which to load the optimizer's moments.

    Raises:
        UserError: `text` is not a run with snapshots.
    """
    if not is_huggingface(text) and not (Path(text) / CONFIG).is_file():
        snapshots = find_run(text) / "snapshots"
        if list_snapshots(snapshots):
            return snapshots
    raise UserError(
        f"fine_tuning.optimizer_state is 'kept'; allowed with init_from {text}, which has no snapshots: reset"
    )


def read_experiment(run: Path) -> Experiment:
    """The experiment of a run, from its JSON; its Python file is not executed.

    Raises:
        UserError: the JSON is invalid, or names a model or corpus that is not registered.
    """
    return from_json(Experiment, read_json(run / EXPERIMENT), kinds())


def check_data(run: Path, store: MixedDataset) -> None:
    """Refuses to resume if the dataset has changed since the run started; its checksums are in stores.json.

    Raises:
        UserError: names the first file that differs.
    """
    known = read_json(run / STORES) if (run / STORES).is_file() else {}
    now = {}
    for name, part in ((source.name, source.dataset) for source in store.sources):
        facts = part.check_same(known[name]) if name in known else part.fingerprint()
        now[name] = {"folder": str(part.folder), **facts}
    if now != known:
        write_json(run / STORES, now)


@contextlib.contextmanager
def acquire_run(run: Path, experiment: Experiment, store: MixedDataset) -> Iterator[None]:
    """Locks the run for this process, checks that its dataset is unchanged, and saves fields changed on resume.

    Raises:
        UserError: another process is training it, or the tokens have changed.
    """
    with lock_run(run):
        check_data(run, store)
        if (wanted := experiment_json(experiment)) != read_json(run / EXPERIMENT):
            write_json(run / EXPERIMENT, wanted)
        yield


def check_resumable(before: Experiment, now: Experiment) -> None:
    """Refuses changes to fields that a snapshot's position or weights depend on.

    Raises:
        UserError: names the first such field.
    """
    old, new = flatten(experiment_json(before)), flatten(experiment_json(now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and (name in FIXED_FIELDS or name.startswith(FIXED_PREFIXES)):
            raise UserError(
                f"{name} is {old.get(name)!r} in this run and cannot become {new.get(name)!r}: the position in the "
                "data or the weights depend on it; start another run, and load the weights with init_from"
            )
    if getattr(now.corpus, "changes", False) and old["training.macro_batches"] != new["training.macro_batches"]:
        raise UserError(
            f"training.macro_batches is {old['training.macro_batches']} in this run and cannot change: the weights of "
            "its mixture change with progress; start another run, and load the weights with init_from"
        )


def environment(experiment: Experiment, overrides: Sequence[str]) -> dict[str, Any]:
    """Versions, git commit, device and command line, for reproducing the run."""
    with on_meta():
        parameters = sum(parameter.numel() for parameter in build_model(experiment.model).parameters())
    return {
        "cleangpt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": describe_device(choose_device(experiment.training.device)),
        "processes": world_size(),
        "git_commit": _git_commit(),
        "parameters": parameters,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "overrides": list(overrides),
        "launch": os.environ.get(LAUNCH_ID),
    }


def _run_before_restart(name: str) -> Path | None:
    """The run that this torchrun launch created before a restart of its processes; None if there is none."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    runs = [path.parent for path in (Path("runs") / name).glob(f"*/{EXPERIMENT}")]
    ours = [run for run in runs if read_json(run / ENVIRONMENT).get("launch") == os.environ.get(LAUNCH_ID)]
    return max(ours, key=lambda run: (run / EXPERIMENT).stat().st_mtime, default=None)


def _new_folder(name: str) -> Path:
    """Creates a folder for a new run, unique even if several runs start at the same time."""
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    for number in itertools.count(1):
        folder = Path("runs") / name / (stamp if number == 1 else f"{stamp}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describes the first field other than run_dir in which two experiments differ; empty if there is none."""
    before, now = flatten(there), flatten(here)
    names = (name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))
    name = next((name for name in names if name != "run_dir"), None)
    return "" if name is None else f"{name} is {before.get(name)!r} there and {now.get(name)!r} here"


def _check_same(run: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if changed := difference(there, here):
        raise UserError(
            f"run_dir is {str(run)!r}, which holds another experiment: {changed}; give another folder, or change "
            "fields with cleangpt resume"
        )


def _git_commit() -> str | None:
    """The git commit of the current folder, with the suffix "-dirty" if files have changed."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
