"""The house: imports run one way, from the stages of a run down to what they are made of, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cleangpt"
FLOORS = [
    "errors", "output", "screen", "files", "hub", "validation", "config", "data", "environments", "corpora", "models",
    "objectives", "distributed", "experiment", "experiment_files", "tracking", "inference", "checkpoints", "rollouts",
    "interchange", "loading", "evaluation", "training", "planning", "commands", "__main__",
]  # fmt: skip
"""From the ground up; a room imports from its own floor and from those before it."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "experiments" not in path.parts}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it, for use or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cleangpt."):
            module = str(node.module).removeprefix("cleangpt.")
            inside = {f"{module}.{entry.name}" for entry in node.names}
            found |= inside & MODULES.keys() or {module}
    return found - {name}


def floor(name: str) -> int:
    return FLOORS.index(name.split(".")[0])


def test_imports_run_down() -> None:
    upward = {
        (name, below) for name in MODULES.keys() - {"__init__"} for below in imports(name) if floor(below) > floor(name)
    }
    assert not upward


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()
