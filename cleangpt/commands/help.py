"""--help: usage, options with what they mean, and for an experiment's many fields, sections to ask for."""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cleangpt.commands.fields import Option
from cleangpt.errors import UserError
from cleangpt.validation import Metavar

CODE = "--code"
CODE_HELP = "Your own Python file to run first, which registers your own models, corpora and objectives."
ALL = "all"
COLUMN = 30
"""Where the meaning of an option starts; a longer name has a line of its own."""
WIDEST = 100
FEW = 25
"""Up to this many options are listed without sections."""


def help_text(options: Sequence[Option], program: str, about: str, topic: str = "") -> str:
    """The help of a command.

    Args:
        options: of the command.
        program: what its user types before them.
        about: what it does.
        topic: a section, an option or "all"; empty: a command of many options lists its sections.

    Raises:
        UserError: there is no such topic; names all.
    """
    sections = find_sections(options)
    if topic and topic != ALL:
        return "\n".join(_lines_of(_on(topic, options, sections)))
    words = "".join(f"{_name(option)} " for option in options if option.positional)
    lines = [f"usage: {program} {words}[OPTIONS]", "", *_wrapped(about), ""]
    brief = not topic and len(options) > FEW
    lines += _lines_of(option for option in options if not brief or not section_of(option))
    lines += _row(f"{CODE} FILE", CODE_HELP)
    if brief:
        lines += ["", f"--help SECTION lists the options of a section, --help {ALL} those of all:", ""]
        lines += [line for name, what in sections.items() for line in _row(name, what)]
    return "\n".join(lines)


def section_of(option: Option) -> str:
    """The section of an option: ``optimizer`` for ``--optimizer.muon.lr``; empty for one without a dot."""
    section, dot, _ = option.name.removeprefix("--").partition(".")
    return section if dot else ""


def find_sections(options: Sequence[Option]) -> dict[str, str]:
    """The sections of options, and what each is: the first line of its dataclass's docstring."""
    classes = {section: option.section for option in options if (section := section_of(option))}
    return {name: (cls.__doc__ or "").strip().partition("\n")[0] for name, cls in classes.items()}


def _on(topic: str, options: Sequence[Option], sections: Iterable[str]) -> list[Option]:
    """The options of a section, or the one of a name.

    Raises:
        UserError: there is none.
    """
    name = topic.removeprefix("--").replace("_", "-")
    found = [option for option in options if option.name.removeprefix("--").startswith(f"{name}.")]
    found = found or [option for option in options if option.name.removeprefix("--") == name]
    if not found:
        hint = similar_options(f"--{name}", [option.name for option in options])
        raise UserError(f"--help {topic}: no section or option has this name{hint}; "
                        f"allowed: {', '.join([ALL, *sections])}")  # fmt: skip
    return found


def similar_options(name: str, known: Sequence[str]) -> str:
    """A hint such as ``; did you mean '--optimizer.lr'?``: the nearest name, or those that end in the same word."""
    if inside := [other for other in known if other.startswith(f"{name}.")]:
        return f", but the start of others: {', '.join(inside[:3])}{', …' * (len(inside) > 3)}"
    ends = {other: _last(other) for other in known}
    alike = [other for other, end in ends.items() if end.replace("-", "") == _last(name).lower().replace("-", "")]
    alike = alike or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if not alike and (near := difflib.get_close_matches(_last(name), ends.values(), n=1, cutoff=0.7)):
        alike = [other for other, end in ends.items() if end == near[0]]
    best = difflib.get_close_matches(name, alike or known, n=3 if alike else 1, cutoff=0.0 if alike else 0.6)
    return f"; did you mean {' or '.join(map(repr, best))}?" if best else ""


def _last(name: str) -> str:
    """The last word of an option's name: ``lr`` of ``--optimizer.lr``."""
    return name.removeprefix("--").rpartition(".")[2]


# One option -----------------------------------------------------------------------------------------------------------
def _lines_of(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        what = field_docs(option.owner).get(str(option.path[-1]), "")
        yield from _row(_name(option), " ".join([what, _default(option)]).strip())


def _name(option: Option) -> str:
    """The option as it is typed: ``--data.seq-len N``, ``RUN``, or both names of a flag."""
    if option.hint is bool:
        return f"{option.name}, {option.negative}"
    if option.positional:
        word = next((mark.word for mark in option.marks if isinstance(mark, Metavar)), option.name.upper())
        return f"[{word} ...]" if option.several else word
    return f"{option.name} {metavar(option.hint)}"


def metavar(hint: Any) -> str:
    """What a value is, for --help: ``N``, ``NUMBER``, ``TEXT``, ``FILE``, ``a|b|none``; ``N ...`` for several."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        given = [mark.word for mark in arguments[1:] if isinstance(mark, Metavar)]
        return given[0] if given else metavar(arguments[0])
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(metavar, arguments)))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        items = [metavar(argument) for argument in arguments if argument is not Ellipsis]
        return " ".join(items) + " ..." * (arguments[-1] is Ellipsis)
    return {int: "N", float: "NUMBER", str: "TEXT", type(None): "none"}.get(hint, str(hint.__name__).upper())


def _default(option: Option) -> str:
    """The default in brackets, as it would be typed."""
    if option.positional or option.default == ():
        return ""
    return "[required]" if option.default is dataclasses.MISSING else f"[default: {_typed(option.default)}]"


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, tuple):
        return " ".join(map(_typed, value))
    return str(value) if str(value) and " " not in str(value) else repr(value)


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, by name, from its source; nothing where there is no source."""
    docs: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(cls)) if dataclasses.is_dataclass(cls) else ""
        except (OSError, TypeError):  # made in an interpreter, or by a program
            continue
        statements = [statement for node in ast.parse(source).body for statement in getattr(node, "body", [])]
        for field, doc in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


# Layout ---------------------------------------------------------------------------------------------------------------
def _row(name: str, what: str) -> list[str]:
    """A name with its meaning beside it, or below if the name is long."""
    lines = textwrap.wrap(what, _columns() - COLUMN, break_long_words=False, break_on_hyphens=False)
    if len(name) > COLUMN - 4 or not lines:
        return [f"  {name}", *(f"{'':{COLUMN}}{line}" for line in lines)]
    return [f"  {name:<{COLUMN - 2}}{lines[0]}", *(f"{'':{COLUMN}}{line}" for line in lines[1:])]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _columns(), break_long_words=False, break_on_hyphens=False)


def _columns() -> int:
    """The width of the help: that of the terminal, within reason."""
    return min(max(shutil.get_terminal_size().columns, COLUMN + 20), WIDEST)
