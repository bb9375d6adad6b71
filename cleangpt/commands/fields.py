"""The options that a dataclass makes: a field is one; inside a nested dataclass, after its name: ``--optimizer.lr``."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Final, get_args, get_origin

from cleangpt.validation import hints_of

POSITIONAL: Final = object()
"""Marks a field whose value is given without a name, such as RUN."""
FLAT: Final = object()
"""Marks a nested dataclass whose options have no prefix."""
VERBATIM: Final = object()
"""Marks an optional text in which the words none and null are text."""


@dataclass(frozen=True)
class Option:
    """An option such as ``--optimizer.lr``, or a positional argument such as ``run``."""

    name: str
    hint: Any
    default: Any
    """MISSING: the option is required."""
    path: tuple[str | int, ...]
    """Fields, and indices of tuples, that lead to the value."""
    owner: type
    """The dataclass that has the field."""
    section: type
    """The outermost dataclass whose name its name starts with; without a dot in the name, the owner."""
    marks: tuple[Any, ...] = ()

    @property
    def positional(self) -> bool:
        """Whether the value is given without the name."""
        return POSITIONAL in self.marks

    @property
    def negative(self) -> str:
        """Of a flag, the name that switches it off: ``--tracking.no-progress``."""
        before, dot, last = self.name.removeprefix("--").rpartition(".")
        return f"--{before}{dot}no-{last}" if self.hint is bool else ""

    @property
    def several(self) -> bool:
        """Whether the value is a tuple."""
        return get_origin(plain(self.hint)) is tuple

    @property
    def any_number(self) -> bool:
        """Whether the value is a tuple of any length."""
        return self.several and get_args(plain(self.hint))[-1] is Ellipsis


def find_options(
    kind: type,
    given: Mapping[str, Any],
    path: tuple[str | int, ...] = (),
    prefix: str = "",
    section: type | None = None,
) -> Iterator[Option]:
    """The options of a dataclass; `given` has the values of fields, which become the defaults."""
    for entry in dataclasses.fields(kind):
        hint, marks = plain(hints_of(kind)[entry.name]), marks_of(hints_of(kind)[entry.name])
        name, inside, default = entry.name.replace("_", "-"), (*path, entry.name), _default(entry, given)
        before = prefix if FLAT in marks else f"{prefix}{name}."
        if dataclasses.is_dataclass(default) or dataclasses.is_dataclass(hint):
            cls, values = _part(hint, default)
            yield from find_options(cls, values, inside, before, section or (cls if before else None))
        elif _holds_dataclasses(default):
            for index, part in enumerate(default):
                yield from find_options(*_part(type(part), part), (*inside, index), f"{before}{index}.", section)
        else:
            shown = name if POSITIONAL in marks else f"--{prefix}{name}"
            yield Option(shown, hints_of(kind)[entry.name], default, inside, kind, section or kind, marks)


def build(kind: type, given: Mapping[str, Any], tree: Mapping[Any, Any]) -> Any:
    """The dataclass with the fields `given`, changed by the values of options in `tree`, nested as the dataclass is."""
    fields: dict[str, Any] = dict(given)
    for entry in dataclasses.fields(kind):
        hint, default = plain(hints_of(kind)[entry.name]), _default(entry, given)
        changes = tree.get(entry.name, {})
        if dataclasses.is_dataclass(default) or dataclasses.is_dataclass(hint):
            fields[entry.name] = build(*_part(hint, default), changes) if changes or default is MISSING else default
        elif _holds_dataclasses(default):
            fields[entry.name] = tuple(
                build(*_part(type(part), part), changes.get(index, {})) for index, part in enumerate(default)
            )
        elif entry.name in tree:
            fields[entry.name] = changes
    return kind(**fields)


def plain(hint: Any) -> Any:
    """An annotation without rules and marks."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def marks_of(hint: Any) -> tuple[Any, ...]:
    """The rules and marks of an annotation."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _part(hint: Any, value: Any) -> tuple[type, dict[str, Any]]:
    """The class of a nested dataclass, and the values of its fields, if it has a value."""
    if value is MISSING:
        return hint, {}
    return type(value), {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}


def _default(entry: "dataclasses.Field[Any]", given: Mapping[str, Any]) -> Any:
    if entry.name in given:
        return given[entry.name]
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _holds_dataclasses(value: Any) -> bool:
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))
