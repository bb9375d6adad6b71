"""Command lines from dataclasses.

tyro makes the parser and --help. Mistakes are found here, before tyro parses, so that each is reported in one line:
an unknown option with the nearest name, a value with what is allowed, missing and unexpected arguments.
"""

import contextlib
import dataclasses
import io
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro

from cleangpt.errors import UserError, nearest
from cleangpt.validation import Rule, describe, fits, hints_of

T = TypeVar("T")

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)
POSITIONAL = get_args(tyro.conf.Positional[str])[1]
FLAT = tyro.conf.arg(name="")
"""Marks a nested dataclass whose options have no prefix."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option such as ``--optimizer.lr``, or a positional argument such as ``run``."""

    hint: Any
    required: bool
    positional: bool = False

    @property
    def several(self) -> bool:
        """Whether the option takes several values."""
        return get_origin(self.hint) is tuple


def parse(kind: type[T], arguments: Sequence[str], *, program: str, about: str = "") -> T:
    """Parses a command line into a dataclass.

    Raises:
        UserError: one line naming the option, its value and what is allowed.
        SystemExit: with code 0, after --help.
    """
    if not {"-h", "--help"} & set(arguments):
        check_arguments(dict(find_options(kind)), arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), prog=program, description=about, config=CONFIG)
    except SystemExit as end:
        if end.code == 0:
            raise
        text = said.getvalue().translate(dict.fromkeys(map(ord, "╭╮╰╯│─")))  # tyro draws a box around it
        raise UserError(f"{' '.join(text.split())}; see --help") from None


def find_options(kind: Any, value: Any = dataclasses.MISSING, prefix: str = "") -> Iterator[tuple[str, Option]]:
    """The options that tyro makes from a dataclass, by name; the fields of `value` are their defaults."""
    cls = kind if value is dataclasses.MISSING else type(value)
    for entry in dataclasses.fields(cls):
        hint, name = hints_of(cls)[entry.name], entry.name.replace("_", "-")
        plain, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        hint = hint if any(isinstance(mark, Rule) for mark in marks) else plain
        default = entry.default if value is dataclasses.MISSING else getattr(value, entry.name)
        inside = prefix if FLAT in marks else f"{prefix}{name}."
        if dataclasses.is_dataclass(hint) or dataclasses.is_dataclass(default):
            yield from find_options(hint, default, inside)
        elif isinstance(default, tuple) and any(map(dataclasses.is_dataclass, default)):
            for index, part in enumerate(default):
                yield from find_options(type(part), part, f"{inside}{index}.")
        elif POSITIONAL in marks:
            yield name, Option(hint, default is dataclasses.MISSING, positional=True)
        else:
            yield f"--{prefix}{'no-' * (default is True)}{name}", Option(hint, default is dataclasses.MISSING)


def check_arguments(options: dict[str, Option], arguments: Sequence[str]) -> None:
    """Refuses unknown options, values that are not allowed, and missing or unexpected arguments.

    Raises:
        UserError: one line.
    """
    given, positional = split_arguments(options, arguments)
    for name, texts in given.items():
        option = options[name]
        if not texts and not option.several and option.hint is not bool:
            raise UserError(f"{name} needs a value; allowed: {describe(option.hint)}")
        value = read_value(texts, option.hint)
        if value is not None and not fits(value, option.hint):
            hint = nearest(texts[0], map(str, get_args(option.hint))) if get_origin(option.hint) is Literal else ""
            raise UserError(f"{name} is {value!r}; allowed: {describe(option.hint)}{hint}")
    places = [name for name, option in options.items() if option.positional]
    if len(positional) > len(places) and not any(options[name].several for name in places):
        raise UserError(f"unexpected argument {positional[len(places)]!r}; see --help")
    there = {*given, *places[: len(positional)]}
    for name, option in options.items():
        if option.required and name not in there:
            raise UserError(f"{name.upper() if option.positional else name} is missing; see --help")


def split_arguments(options: dict[str, Option], arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values that follow each option, and the positional arguments.

    Raises:
        UserError: an option does not exist; names the nearest.
    """
    given: dict[str, list[str]] = {}
    positional: list[str] = []
    room = 0
    for word in arguments:
        if word.startswith("--"):
            name, equals, text = word.partition("=")
            known = name.replace("_", "-")
            if known not in options:
                raise UserError(f"{name} is not an option{nearest(known, options)}; see --help")
            texts = given[known] = [text] if equals else []
            option = options[known]
            room = 0 if option.hint is bool else len(arguments) if option.several else 1 - len(texts)
        elif room:
            texts.append(word)
            room -= 1
        else:
            positional.append(word)
    return given, positional


def read_value(texts: Sequence[str], hint: Any) -> Any:
    """Parses a number, choice or text; invalid ones stay text; None: a type that is left to tyro."""
    if get_origin(hint) is tuple:
        items = get_args(hint)
        items = items[:1] * len(texts) if items[-1] is Ellipsis else items
        values = tuple(map(_read, texts, items)) if len(items) == len(texts) else tuple(texts)
        return None if None in values else values
    return _read(texts[0], hint) if texts else None


def _read(text: str, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _read(text, arguments[0])
    if origin in (Union, types.UnionType):
        plain = [argument for argument in arguments if argument is not type(None)]
        return None if text == "None" or len(plain) > 1 else _read(text, plain[0])
    if origin is Literal:
        return next((choice for choice in arguments if str(choice) == text), text)
    if hint in (int, float):
        with contextlib.suppress(ValueError):
            return hint(text)
    return text if hint in (int, float, str) else None
