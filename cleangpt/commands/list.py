"""list: show all experiments, corpora and models"""

import ast
import dataclasses
from collections.abc import Sequence

from cleangpt.commands.options import parse
from cleangpt.corpora import CORPORA
from cleangpt.experiment_files import experiments
from cleangpt.models import MODELS


@dataclasses.dataclass
class Options:
    """Options of `cleangpt list`: none."""


def command(words: Sequence[str]) -> None:
    """Prints a line for each experiment, corpus and model."""
    parse(Options, words, program="cleangpt list", about="Lists all experiments, corpora and models.")
    docs = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in experiments().items()}
    sections = {
        "experiments": docs,
        "corpora": {name: cls.__doc__ for name, cls in CORPORA.items()},
        "models": {name: cls.__doc__ for name, (_, cls) in MODELS.items()},
    }
    for title, entries in sections.items():
        print(title)
        for name, doc in entries.items():
            print(f"  {name:<24}  {(doc or '').strip().splitlines()[0] if doc else ''}")
