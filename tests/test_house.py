"""What README and CONTRIBUTING promise about the size and the order of the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from cleangpt.training.trainer import Trainer

PACKAGE = Path(__file__).parents[1] / "cleangpt"
SPINE = (
    "config", "data/dataset", "data/shuffle", "data/loader", "data/batch", "models/base", "models/gpt",
    "objectives/next_token", "training/trainer", "training/state", "training/optimizer", "training/schedules",
)  # fmt: skip
"""The way of a batch from disk to optimizer step."""
MAY_SEE_ALL = {
    "experiment", "experiment_files", "training/launch", "training/build", "training/placing", "training/resolve",
    "training/schedules", "training/sources", "training/summary", "training/tuning", "checkpoints/run_folder",
    "evaluation/datasets", "evaluation/evaluate", "planning/plan", "__init__",
}  # fmt: skip
"""Modules that take a whole Experiment; commands do as well."""
SCREEN = 50
"""Lines."""


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if "experiments" not in path.parts)
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in paths}


def test_the_spine_is_under_2000_lines() -> None:
    assert sum(len(lines_of(PACKAGE / f"{name}.py")) for name in SPINE) < 2000


def test_a_file_over_400_lines_says_why_at_its_top() -> None:
    long = {name: path for name, path in modules().items() if len(lines_of(path)) > 400}
    silent = [
        name for name, path in long.items() if "400 lines" not in (ast.get_docstring(ast.parse(path.read_text())) or "")
    ]
    assert not silent


def test_the_trainer_shows_a_run_and_a_step_on_one_screen_each() -> None:
    assert len(lines_of(PACKAGE / "training/trainer.py")) <= 260
    assert all(len(inspect.getsource(method).splitlines()) <= SCREEN for method in (Trainer.train, Trainer.step))


@pytest.mark.parametrize(
    ("call", "door"),
    [
        (r"\.expanduser\(", "files"),  # a home folder that is not there is a mistake, not a traceback
        (r"\bsave_file\(", "checkpoints/tensor_files"),  # safetensors' own files are private, and shuffle metadata
    ],
)
def test_what_needs_care_has_one_door(call: str, door: str) -> None:
    callers = {name for name, path in modules().items() if re.search(call, path.read_text(encoding="utf-8"))}
    assert callers == {door}


def test_constructors_take_their_part_of_an_experiment() -> None:
    for name, path in modules().items():
        sees_all = re.search(
            r"import .*\bExperiment\b|^    Experiment,$", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert not sees_all or name in MAY_SEE_ALL or name.startswith("commands/"), f"{name} takes a whole Experiment"
