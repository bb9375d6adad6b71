"""Experiment files: where they are found, and how one becomes an `Experiment`.

An experiment file *is* code and is executed: by train, resume, plan, tune, report --schedule and --code, and nowhere
else.
"""

import ast
import dataclasses
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from cleangpt.errors import UserError, nearest, parsing
from cleangpt.experiment import Experiment
from cleangpt.files import read_json, read_text, user_path
from cleangpt.validation import Checked

MODULE = "cleangpt_experiment"


def folders() -> list[Path]:
    """Where experiments are looked up by name: ./experiments, then those that came with CleanGPT."""
    package = Path(__file__).parent
    shipped = package / "experiments" if (package / "experiments").is_dir() else package.parent / "experiments"
    return [Path("experiments"), shipped]


def experiments() -> dict[str, Path]:
    """Every experiment that can be given by name."""
    found: dict[str, Path] = {}
    for folder in reversed(folders()):
        found |= {path.stem: path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")}
    return dict(sorted(found.items()))


def find_experiment(text: str) -> Path:
    """The Python file of an experiment, given by its path or name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if (path := user_path(text)).is_file():
        return path
    known = experiments()
    if text not in known:
        where = (
            "no such file" if text.endswith(".py") or "/" in text else "neither a file nor one of " + ", ".join(known)
        )
        raise UserError(f"experiment {text!r}: {where}{nearest(text, known)}")
    return known[text]


def load_experiment(path: Path) -> Experiment:
    """Runs a Python file and returns the `experiment` it builds.

    Raises:
        UserError: the file builds none, or builds it with a wrong field.
    """
    module = run_file(path)
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} does not build an Experiment; its last lines should be: experiment = Experiment(...)")
    return experiment


def run_code(name: str) -> None:
    """Runs the file given with `--code`, which registers the user's own classes."""
    run_file(find_experiment(name))


def run_file(path: Path) -> Any:
    """Imports a Python file as a module and returns it; its classes register themselves.

    Raises:
        UserError: the file is not Python, or it fails; names its line and the error.
    """
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.path.insert(0, str(path.parent))
    try:
        _check_python(path)
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except UserError as error:
        raise UserError(f"{_location(path, error)}: {error}") from None
    except (Exception, SystemExit) as error:
        said = _wrong_field(str(error)) if isinstance(error, TypeError) else ""
        raise UserError(f"{_location(path, error)}: {said or _told(path, error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _check_python(path: Path) -> None:
    """Raises UserError where Python's parser fails with anything but a SyntaxError."""
    source = read_text(path)
    try:
        ast.parse(source)
    except (MemoryError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not Python: {error or 'it is nested too deeply'}") from None


def _location(path: Path, error: BaseException) -> str:
    """The file, and its line that raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _told(path: Path, error: BaseException) -> str:
    """An error of the user's code in one line; where it was raised in another file, with that place."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    elsewhere = Path(last.filename).resolve() != path.resolve()
    return f"{type(error).__name__}: {error}" + f" ({last.filename}, line {last.lineno})" * elsewhere


def recorded_overrides(path: Path) -> list[str]:
    """The overrides that the run was started with, where `path` is the experiment.py of a run directory."""
    if path.name != "experiment.py" or not (path.parent / "environment.json").is_file():
        return []
    facts = read_json(path.parent / "environment.json")
    with parsing(path.parent / "environment.json"):
        return _without_run([str(word) for word in facts.get("overrides", [])])


def _without_run(words: list[str]) -> list[str]:
    """Drops ``--run-dir FOLDER`` and ``--time-limit TIME``: a repetition is another run and another launch."""
    names = ("--run-dir", "--run_dir", "--time-limit", "--time_limit")
    kept, rest = [], iter(words)
    for word in rest:
        if word in names:
            next(rest, None)
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def _config_classes() -> list[Any]:
    """Every dataclass that can be part of an experiment, the user's own included."""
    found: list[Any] = [Checked]
    for cls in found:  # the list grows while it is iterated, so that subclasses of subclasses are found too
        found += [subclass for subclass in cls.__subclasses__() if subclass not in found]
    return found[1:]


def _wrong_field(message: str) -> str:
    """A readable message for the TypeError of a dataclass's constructor; empty for any other error."""
    match = re.match(r"(\w+)\.__init__\(\) (?:got an unexpected keyword argument|missing .*?:) '(\w+)'", message)
    cls = next((cls for cls in _config_classes() if match and cls.__name__ == match.group(1)), None)
    if match is None or cls is None:
        return ""
    name, known = match.group(2), [entry.name for entry in dataclasses.fields(cls)]
    if name in known:
        return f"{cls.__name__} needs the field {name!r}"
    return f"{cls.__name__} has no field {name!r}{nearest(name, known) or '; it has ' + ', '.join(known)}"
