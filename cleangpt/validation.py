"""Dataclasses that validate themselves, and convert to and from JSON.

A field's annotation says which values are allowed: its type, and rules such as ``Annotated[int, Bounds(1, 4096)]``.
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cleangpt.errors import UserError, nearest

T = TypeVar("T")


# Rules in annotations -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bounds:
    """The range of a number."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    even: bool = False

    def allows(self, value: Any) -> bool:
        """Whether `value` is in the range."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and not (self.even and value % 2)
        )

    def describe(self, number: str) -> str:
        """The rule for a message, after the type: ``a whole number of 1 or more, at most 4,096``."""
        parts = [f"of {self.least:,} or more"] if self.least is not None else []
        parts += [f"above {self.above:,}"] if self.above is not None else []
        parts += [f"at most {self.most:,}"] if self.most is not None else []
        parts += [f"below {self.below:,}"] if self.below is not None else []
        number = number.replace("a whole", "an even") if self.even else number
        return f"{number} {', '.join(parts)}"


@dataclass(frozen=True)
class Pattern:
    """The regular expression that a text must match, and its description for messages."""

    pattern: str
    words: str

    def allows(self, value: Any) -> bool:
        """Whether `value` matches."""
        return re.fullmatch(self.pattern, value) is not None

    def describe(self, text: str) -> str:
        """The rule for a message."""
        return self.words


@dataclass(frozen=True)
class Metavar:
    """What a text is, for --help: a FILE, a FOLDER. No rule: every text is allowed."""

    word: str


Rule = Bounds | Pattern
Count = Annotated[int, Bounds(1, 2**40)]
"""Bounded, so that products of several counts still fit into 64 bits."""
CountOrZero = Annotated[int, Bounds(0, 2**63 - 1)]
Share = Annotated[float, Bounds(0, 1)]
ShareBelowOne = Annotated[float, Bounds(0, below=1)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(above=0)]
File = Annotated[str, Metavar("FILE")]
Folder = Annotated[str, Metavar("FOLDER")]
Device = Annotated[
    str, Pattern(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", "auto, cpu, cuda, cuda:N or mps"), Metavar("DEVICE")
]
RunOrModel = Annotated[str, Metavar("RUN|CHECKPOINT|hf:NAME")]


# Checking ------------------------------------------------------------------------------------------------------------
class FieldError(UserError):
    """A field with a value that is not allowed; `section` is the place of its dataclass in an experiment."""

    def __init__(self, section: str, field: str, value: Any, allowed: str) -> None:
        self.rest = f"{field} is {value!r}; allowed: {allowed}"
        super().__init__(f"{section}.{self.rest}" if section else self.rest)


class Checked:
    """A dataclass that checks itself; `section` is its place in an experiment, such as ``optimizer.muon``."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None) -> None:
        super().__init_subclass__()
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        check(self)


def check(config: Any) -> None:
    """Checks the type and the range of every field of a dataclass; nested dataclasses check themselves.

    Raises:
        FieldError: one line naming the field, its value and what is allowed.
    """
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            infinite = isinstance(value, float) and not math.isfinite(value)
            raise FieldError(config.section, name, value, "a finite number" if infinite else describe(hint))


def hints_of(cls: Any) -> dict[str, Any]:
    """The annotations of all fields of a dataclass, with their rules."""
    if cls not in _HINTS:
        hints = get_type_hints(cls, include_extras=True)
        _HINTS[cls] = {entry.name: hints[entry.name] for entry in dataclasses.fields(cls)}
    return _HINTS[cls]


_HINTS: dict[type, dict[str, Any]] = {}
"""A cache by class: evaluating annotations takes longer than checking values."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value satisfies an annotation; an int passes as a float, and a float must be finite."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0]) and all(rule.allows(value) for rule in arguments[1:] if isinstance(rule, Rule))
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value is argument or (value == argument and type(value) is type(argument)) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        expected = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(expected) and all(map(fits, value, expected))
    if hint is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """An annotation for a message: ``a whole number of 1 or more, or None``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        words = describe(arguments[0])
        for rule in arguments[1:]:
            words = rule.describe(words) if isinstance(rule, Rule) else words
        return words
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return "a tuple of " + ", ".join("…" if argument is Ellipsis else describe(argument) for argument in arguments)
    words_of = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return words_of.get(hint, f"a {getattr(hint, '__name__', hint)}")


# To and from JSON ----------------------------------------------------------------------------------------------------
def to_json(config: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A dataclass as a JSON object, with a `kind` if its class is in the registry `kinds`."""
    names = {cls: name for name, cls in kinds.items()}
    entries: dict[str, Any] = {"kind": names[type(config)]} if type(config) in names else {}
    return entries | {entry.name: _as_json(getattr(config, entry.name), kinds) for entry in dataclasses.fields(config)}


def _as_json(value: Any, kinds: Mapping[str, type]) -> Any:
    if isinstance(value, tuple):
        return [_as_json(part, kinds) for part in value]
    return to_json(value, kinds) if dataclasses.is_dataclass(value) else value


def from_json(cls: type[T], value: Any, kinds: Mapping[str, type], path: str = "") -> T:
    """The dataclass that `to_json` wrote; nothing in the file is executed.

    Raises:
        UserError: a field, kind, type or range that this version does not know.
    """
    if isinstance(value, str) and value in kinds:
        value = {"kind": value}
    if not isinstance(value, dict):
        raise UserError(f"{path.strip('.') or cls.__name__} is {value!r}; allowed: an object")
    entries = dict(value)
    kind = entries.pop("kind", None)
    if kind is not None:
        if not isinstance(kind, str) or kind not in kinds or not issubclass(kinds[kind], cls):
            hint = nearest(str(kind), kinds)
            raise UserError(
                f"{path.strip('.') or cls.__name__} is of kind {kind!r}, which is not registered here{hint}; "
                "if the kind is your own, run the file that defines it first: --code FILE, or an import in Python"
            )
        cls = kinds[kind]
    elif cls not in kinds.values() and (of_it := sorted(name for name, one in kinds.items() if issubclass(one, cls))):
        raise UserError(f"{path}kind is missing; allowed: {', '.join(of_it)}")
    hints = hints_of(cls)
    for name in entries:
        if name not in hints:
            raise UserError(f"{path}{name} is not a field of {cls.__name__}{nearest(name, hints)}")
    missing = {entry.name for entry in dataclasses.fields(cls)  # type: ignore[arg-type]
               if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING}  # fmt: skip
    if lacking := sorted(missing - set(entries)):
        raise UserError(f"{path}{lacking[0]} is missing; allowed: {describe(hints[lacking[0]])}")
    parts = {name: _from_json(hints[name], entry, kinds, f"{path}{name}.") for name, entry in entries.items()}
    try:
        return cls(**parts)
    except FieldError as error:
        raise UserError(f"{path}{error.rest}") from None


def _from_json(hint: Any, value: Any, kinds: Mapping[str, type], path: str) -> Any:
    """A field's value: lists become tuples, objects the dataclass that the annotation names."""
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value, kinds, path)
    if isinstance(value, list):
        inner = next(filter(dataclasses.is_dataclass, get_args(hint)), None)
        return tuple(_from_json(inner, part, kinds, f"{path}{index}.") for index, part in enumerate(value))
    return value


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Flattens a nested JSON object: ``{"optimizer.lr": 0.001}``; objects in a list are numbered."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = {str(index): part for index, part in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}{key}.")
        else:
            flat[path + key] = value
    return flat
