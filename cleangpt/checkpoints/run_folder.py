"""The run folder: its files, its lock, and how to find a run or a checkpoint."""

import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cleangpt import __version__
from cleangpt.checkpoints.checkpoint import CONFIG, best_checkpoint
from cleangpt.checkpoints.lock import LOCK, lock_run
from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.corpora import CORPORA
from cleangpt.corpora.mixture import Mixture
from cleangpt.data.mixing import MixedDataset
from cleangpt.distributed.device import choose_device, describe_device
from cleangpt.distributed.processes import world_size
from cleangpt.errors import UserError, parsing
from cleangpt.experiment import Experiment
from cleangpt.files import PARTIAL, read_json, user_path, write_bytes, write_json
from cleangpt.hub import is_huggingface
from cleangpt.models import build_model, model_kinds
from cleangpt.models.meta import on_meta
from cleangpt.objectives import OBJECTIVES
from cleangpt.validation import flatten, from_json, to_json

POSITION = "the position in the data or the weights depend on it"
FIXED_FIELDS = {
    **dict.fromkeys(("name", "data.seq_len", "data.batch_size", "training.batches_per_macro_batch"), POSITION),
    **dict.fromkeys(("training.seed", "fine_tuning.freeze", "objective"), POSITION),
    **dict.fromkeys(("rollouts.prompts", "rollouts.completions", "rollouts.passes"), POSITION),
    **dict.fromkeys(("init_from", "encoder_from", "fine_tuning.optimizer_state"), "the run has begun with it"),
    "data.val_samples": "the losses of its checkpoints were measured on that many",
}
"""Fields that cannot change when a run is resumed, and why."""
FIXED_PARTS = ("corpus.", "model.", "objective.", "fine_tuning.lora.")
"""Parts of which no field can."""


EXPERIMENT, EXPERIMENT_FILE, ENVIRONMENT = "experiment.json", "experiment.py", "environment.json"


STATUS, STORES = "status.json", "stores.json"
STARTED = "%Y-%m-%dT%H:%M:%S%z"
"""How environment.json writes the time at which the run began."""


LAUNCH_ID = "TORCHELASTIC_RUN_ID"
"""The environment variable in which torchrun identifies a launch; the same after restarts."""


def kinds() -> dict[str, type]:
    """All registered classes that an experiment's JSON may refer to by name."""
    return {**model_kinds(), **CORPORA, "mixture": Mixture, **OBJECTIVES}


def experiment_json(experiment: Experiment) -> dict[str, Any]:
    """Every field of an experiment, resolved, as JSON."""
    return to_json(experiment, kinds())


def choose_folder(experiment: Experiment) -> Path:
    """The folder of the experiment's run: `run_dir` if that is given, else a new one."""
    return given_folder(experiment) or _run_before_restart(experiment.name) or _new_folder(experiment.name)


def given_folder(experiment: Experiment) -> Path | None:
    """The folder named by `run_dir`."""
    return None if experiment.run_dir is None else user_path(experiment.run_dir)


def check_same(run: Path, experiment: Experiment) -> None:
    """Refuses a folder that holds the run of another experiment.

    Raises:
        UserError: names the first field that differs, and whether `resume` can change it.
    """
    if not (run / EXPERIMENT).is_file():
        return
    there, here = read_json(run / EXPERIMENT), experiment_json(experiment)
    if names := differing(there, here):
        fixed = [name for name in names if _why_fixed(name)]
        name = (fixed or names)[0]
        raise UserError(
            f"run_dir is {str(run)!r}, which holds another experiment: {_values(name, there, here)}; give another "
            "folder" + ("" if fixed else f", or change the field with cleangpt resume {run}")
        )


def record_run(
    run: Path, experiment: Experiment, data: Mapping[str, Any], source: Path | None, overrides: Sequence[str]
) -> None:
    """Writes what a run is made of, once nothing can refuse it any more; of a resumed one, what has changed.

    Args:
        run: its folder.
        experiment: with every field resolved.
        data: from `check_data`.
        source: the experiment's Python file, copied into a new run; None: not copied.
        overrides: the command-line arguments after the experiment, saved so that the run can be repeated.
    """
    wanted, begun = experiment_json(experiment), (run / EXPERIMENT).is_file()
    if data and not (begun and _known_data(run) == data):
        write_json(run / STORES, data)
    if not begun:
        if source is not None:
            write_bytes(run / EXPERIMENT_FILE, source.read_bytes())
        write_json(run / ENVIRONMENT, environment(experiment, overrides))
    if not begun or read_json(run / EXPERIMENT) != wanted:
        write_json(run / EXPERIMENT, wanted)


def open_run(experiment: Experiment, source: Path | None, overrides: Sequence[str]) -> Path:
    """`choose_folder`, `check_same` and `record_run`, for a run whose data and weights nothing can refuse.

    Raises:
        UserError: the folder holds a run of another experiment, or another process is training it.
    """
    run = choose_folder(experiment)
    with acquire_run(run, experiment):
        record_run(run, experiment, {}, source, overrides)
    return run


def check_folder(experiment: Experiment) -> None:
    """Refuses a folder that is neither a run nor one that was killed while being created.

    Raises:
        UserError: `experiment.run_dir` is a file, or a folder with other content.
    """
    run = given_folder(experiment)
    if run is None or not run.exists() or (run / EXPERIMENT).is_file():
        return
    written = (STORES, EXPERIMENT_FILE, ENVIRONMENT, EXPERIMENT)
    expected = {name + end for name in written for end in ("", PARTIAL)} | {LOCK, "wandb", "wandb.json", "tensorboard"}
    if run.is_file() or {path.name for path in run.iterdir()} - expected:
        raise UserError(f"run_dir is {str(run)!r}, which holds something else; give another folder")


def find_run(text: str) -> Path:
    """Finds a run by its folder, by a folder of runs (the newest one), or by an experiment's name.

    Raises:
        UserError: there is no such run.
    """
    for path in (user_path(text), Path("runs") / text):
        if (path / EXPERIMENT).is_file():
            return path
        if inside := [found.parent for found in path.glob(f"*/{EXPERIMENT}")]:
            return max(inside, key=_age)
    raise UserError(f"{text} is not a run; allowed: a folder with an {EXPERIMENT}, or a name in runs/")


def _age(run: Path) -> tuple[float, list[int]]:
    """Sorts runs by when they began, which neither a copy nor `touch` changes, and then by the numbers of their names.

    A run without a time, whose environment.json is gone, counts as the oldest.
    """
    numbers = [int(number) for number in re.findall(r"\d+", run.name)]
    try:
        began = datetime.strptime(read_json(run / ENVIRONMENT)["started"], STARTED).timestamp()
    except (UserError, LookupError, TypeError, ValueError):
        began = 0.0
    return began, numbers


def write_status(run: Path, status: str | None, reason: str | None = None) -> None:
    """Writes how training ended, for scripts that decide whether to restart it; None: it is running."""
    (run / STATUS).unlink(missing_ok=True)
    if status is not None:
        write_json(run / STATUS, {"status": status, "reason": reason})


def find_checkpoint(text: str) -> Path:
    """Finds a checkpoint by its folder, or the best one of the run that `find_run` finds."""
    folder = user_path(text)
    return folder if (folder / CONFIG).is_file() else best_checkpoint(find_run(text))


def find_moments(text: str) -> Path:
    """The snapshots folder of a run, from which to load the optimizer's moments.

    Raises:
        UserError: `text` is not a run with snapshots.
    """
    if not is_huggingface(text) and not (user_path(text) / CONFIG).is_file():
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
    try:
        return from_json(Experiment, read_json(run / EXPERIMENT), kinds())
    except UserError as error:
        raise UserError(
            f"{run / EXPERIMENT} (if another version of CleanGPT wrote it, go on with that, or start another run whose "
            f"init_from is this one): {error}"
        ) from None


def check_data(run: Path, dataset: MixedDataset) -> dict[str, Any]:
    """Refuses a dataset that is not the one the run began with, whose checksums are in stores.json.

    Returns:
        The folder and the checksums of each source, for `record_run`.

    Raises:
        UserError: names the first file that differs.
    """
    known, now = _known_data(run), {}
    with parsing(run / STORES):
        for name, part in ((source.name, source.dataset) for source in dataset.sources):
            facts = part.check_same(known[name]) if name in known else part.fingerprint()
            now[name] = {"folder": str(part.folder), **facts}
    return now


def _known_data(run: Path) -> dict[str, Any]:
    return read_json(run / STORES) if (run / STORES).is_file() else {}


@contextlib.contextmanager
def acquire_run(run: Path, experiment: Experiment, resumed: bool = False) -> Iterator[None]:
    """Makes the folder of a run and locks it; where no run has begun by the end, everything is as it was.

    Args:
        run: its folder.
        experiment: with every field resolved.
        resumed: whether fields may differ from those of the run, as `check_resumable` allows.

    Raises:
        UserError: another process is training it, or the folder holds a run of another experiment.
    """
    made = [place for place in (run, *run.parents) if experiment.run_dir is None or not place.exists()]
    run.mkdir(parents=True, exist_ok=True)
    with lock_run(run):
        try:
            if not resumed:
                check_same(run, experiment)
            yield
        finally:
            if not (run / EXPERIMENT).is_file():
                with contextlib.suppress(OSError):  # Windows keeps a file that is open
                    (run / LOCK).unlink()
                    for place in made:  # only empty ones can be removed
                        place.rmdir()


def check_registered(experiment: Experiment) -> None:
    """Refuses an experiment that could not be read back from its run, as resume and evaluate do.

    Raises:
        UserError: a model or an objective is not registered, or a field of one is nothing that JSON has.
    """
    for name, registry in (("model", "MODELS"), ("objective", "OBJECTIVES")):
        kind = type(getattr(experiment, name))
        if kind not in kinds().values():
            raise UserError(f"{name} is a {kind.__name__}, which is not registered: add a line for it to {registry}")
    try:
        json.dumps(experiment_json(experiment))
    except TypeError as error:
        raise UserError(f"the experiment cannot be written to {EXPERIMENT}: {error}") from None


def check_resumable(before: Experiment, now: Experiment) -> None:
    """Refuses changes to fields that a snapshot's position or weights depend on.

    Raises:
        UserError: names the first such field.
    """
    if before.run_dir != now.run_dir:
        raise UserError(
            f"run_dir is {now.run_dir!r}; a run is resumed in its own folder; to have it elsewhere, move the folder"
        )
    old, new = experiment_json(before), experiment_json(now)
    for name in differing(old, new):
        if why := _why_fixed(name):
            there, here = flatten(old).get(name), flatten(new).get(name)
            raise UserError(
                f"{name} is {there!r} in this run and cannot become {here!r}: {why}; start another run, and load the "
                "weights with init_from"
            )
    length = before.training.macro_batches
    if getattr(now.corpus, "changes", False) and length != now.training.macro_batches:
        raise UserError(
            f"training.macro_batches is {length} in this run and cannot change: the weights of "
            "its mixture change with progress; start another run, and load the weights with init_from"
        )


def environment(experiment: Experiment, overrides: Sequence[str]) -> dict[str, Any]:
    """Versions, git commit, device and command line, for reproducing the run."""
    with on_meta():
        model = build_model(experiment.model, experiment.objective.heads)
        parameters = sum(parameter.numel() for parameter in model.parameters())
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
        "started": time.strftime(STARTED),
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
    return max(ours, key=_age, default=None)


def _new_folder(name: str) -> Path:
    """Creates a folder for a new run, unique even if several runs start at the same time."""
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    for number in itertools.count(1):
        folder = Path("runs") / name / (stamp if number == 1 else f"{stamp}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields other than run_dir in which two experiments, as JSON, differ; sorted."""
    before, now = flatten(there), flatten(here)
    names = sorted((before.keys() | now.keys()) - {"run_dir"})
    return [name for name in names if before.get(name) != now.get(name)]


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describes the first field in which two experiments differ; empty if there is none."""
    names = differing(there, here)
    return _values(names[0], there, here) if names else ""


def _values(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return f"{name} is {flatten(there).get(name)!r} there and {flatten(here).get(name)!r} here"


def _why_fixed(name: str) -> str:
    """Why a field cannot change when a run is resumed; empty if it can."""
    return POSITION if name.startswith(FIXED_PARTS) else FIXED_FIELDS.get(name, "")


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
