"""Command lines read into dataclasses.

A mistake is one line: an unknown option with the nearest names, a value with what is allowed, missing and unexpected
arguments.
"""

import itertools
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

from cleangpt.commands.fields import VERBATIM, Option, build, find_options, plain
from cleangpt.commands.help import CODE, help_text, similar_options
from cleangpt.errors import UserError, nearest
from cleangpt.validation import describe, fits

T = TypeVar("T")

HELP: Final = ("-h", "--help")
NONE: Final = ("none", "null")
"""What None is on a command line, in any case of letters."""


def parse(
    kind: type[T], arguments: Sequence[str], *, program: str, about: str = "", given: Mapping[str, Any] | None = None
) -> T:
    """Parses a command line into a dataclass.

    Args:
        kind: the dataclass.
        arguments: the words after `program`.
        program: what stands before them, for --help.
        about: what it does, for --help.
        given: defaults of fields, by name, in place of those of `kind`.

    Raises:
        UserError: one line naming the option, its value and what is allowed.
        SystemExit: with code 0, after --help.
    """
    options = {option.name: option for option in find_options(kind, given or {})}
    if asks_for_help(arguments):
        print(help_text(list(options.values()), program, about, help_topic(arguments)))
        raise SystemExit(0)
    tree: dict[Any, Any] = {}
    for name, value in read_arguments(options, arguments).items():
        *outer, last = options[name].path
        branch = tree
        for part in outer:
            branch = branch.setdefault(part, {})
        branch[last] = value
    made: T = build(kind, given or {}, tree)
    return made


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether --help is among the words."""
    return any(word in HELP for word in arguments)


def help_topic(arguments: Sequence[str]) -> str:
    """The word after --help, such as a section of the options; empty if there is none."""
    after = [word for before, word in itertools.pairwise(arguments) if before in HELP]
    return after[0] if after and not after[0].startswith("-") else ""


# From words to values -------------------------------------------------------------------------------------------------
def read_arguments(options: Mapping[str, Option], arguments: Sequence[str]) -> dict[str, Any]:
    """The values given, by the name of their option.

    Raises:
        UserError: an option or a value is not allowed, missing or unexpected.
    """
    given, positional = split_arguments(options, arguments)
    values = {name: _read_option(options[name], texts) for name, texts in given.items()}
    places = [option for option in options.values() if option.positional]
    for option in places:
        count = len(positional) if option.several else 1
        if positional:
            values[option.name] = _read_option(option, positional[:count])
        positional = positional[count:]
    if positional:
        raise UserError(f"unexpected argument {positional[0]!r}; see --help")
    for name, option in options.items():
        if option.default is MISSING and name not in values:
            raise UserError(f"{name.upper() if option.positional else name} is missing; see --help")
    return values


def split_arguments(options: Mapping[str, Option], arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The words that follow each option, for a flag whether it is on; and the positional arguments.

    Raises:
        UserError: an option does not exist; names the nearest. Or a flag has a value.
    """
    flags = {name: (option, True) for name, option in options.items() if option.hint is bool}
    flags |= {option.negative: (option, False) for option, _ in flags.values()}
    given: dict[str, Any] = {}
    positional: list[str] = []
    taking: list[str] = []
    room = 0
    for word in arguments:
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--"):
            (taking if room else positional).append(word)
            room = max(room - 1, 0)
        elif name in flags:
            option, on = flags[name]
            if equals:
                raise UserError(f"{name} takes no value; {option.negative} switches it off")
            given[option.name], room = on, 0
        elif name not in options:
            names = [known for known in [*options, *flags, CODE] if known.startswith("--")]
            raise UserError(f"{word.partition('=')[0]} is not an option{similar_options(name, names)}; see --help")
        else:
            before = given.get(name, []) if options[name].any_number else []
            taking = given[name] = [*before, text] if equals else [*before]
            room = width(options[name].hint, len(arguments)) - len(taking)
    return given, positional


def _read_option(option: Option, texts: Any) -> Any:
    """The value of an option, given as words.

    Raises:
        UserError: it is not allowed.
    """
    if isinstance(texts, bool):
        return texts
    name = option.name.upper() if option.positional else option.name
    if not texts and width(option.hint, 0):
        raise UserError(f"{name} needs a value; allowed: {describe(option.hint)}")
    if VERBATIM in option.marks:
        return texts[0]
    try:
        value = read(texts, option.hint)
        allowed = fits(value, option.hint)
    except ValueError:
        value, allowed = " ".join(texts), False
    if not allowed:
        choices = get_args(plain(option.hint)) if get_origin(plain(option.hint)) is Literal else ()
        hint = nearest(str(value), map(str, choices))
        raise UserError(f"{name} is {value!r}; allowed: {describe(option.hint)}{hint}")
    return value


def read(texts: Sequence[str], hint: Any) -> Any:
    """The value of an annotation's type that some words stand for.

    Raises:
        ValueError: they stand for none.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return read(texts, arguments[0])
    if origin in (Union, types.UnionType):
        return _read_union(texts, sorted(arguments, key=lambda argument: argument is not type(None)))
    if origin is tuple:
        return _read_tuple(texts, arguments)
    (text,) = texts
    if origin is Literal:
        return {str(choice): choice for choice in arguments}.get(text, text)
    if hint is type(None) and text.lower() not in NONE:
        raise ValueError(text)
    return None if hint is type(None) else hint(text)


def _read_union(texts: Sequence[str], hints: Sequence[Any]) -> Any:
    """The value of the first type that the words fit."""
    for hint in hints:
        try:
            value = read(texts, hint)
        except ValueError:
            continue
        if fits(value, hint) or hint is hints[-1]:
            return value
    raise ValueError(" ".join(texts))


def _read_tuple(texts: Sequence[str], hints: Sequence[Any]) -> tuple[Any, ...]:
    """A tuple, each of whose items takes as many words as its type needs."""
    if hints[-1] is Ellipsis:
        hints = [hints[0]] * (len(texts) // width(hints[0], 1))
    values, left = [], list(texts)
    for hint in hints:
        size = width(hint, 1)
        values.append(read(left[:size], hint))
        left = left[size:]
    if left:
        raise ValueError(left)
    return tuple(values)


def width(hint: Any, most: int) -> int:
    """The number of words that a value takes; `most` for a type that takes any number of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return width(arguments[0], most)
    if origin in (Union, types.UnionType):
        return max(width(argument, most) for argument in arguments)
    if origin is tuple:
        return most if arguments[-1] is Ellipsis else sum(width(argument, most) for argument in arguments)
    return 1
