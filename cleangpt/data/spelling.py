"""Special tokens that data or users spell, and how they are kept from becoming real ones.

A template joins the text of messages with its own, and the result is read with special tokens on. So a message that
says `<|endoftext|>`, in any field that a template writes, could end a text or speak in another's name; and so could a
role `|endoftext|` that a template puts between `<` and `>`. To find these, a conversation is rendered a second time,
with `GUARD`, a noncharacter of Unicode, within everything that is a special token or could become a part of one.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

GUARD = "\ufdd2"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that templates know; some make special tokens of them, such as ``'<|' + role + '|>'``."""


def texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from texts(key)
            yield from texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from texts(part)


def special_in(text: str, names: Collection[str]) -> list[str]:
    """The special tokens in a text, in order."""
    return pattern(names).findall(text)


def pattern(names: Collection[str]) -> re.Pattern[str]:
    """Matches each of these names, the longest first, as its only group."""
    return _known(tuple(names)).exact


def guarded(messages: Sequence[Mapping[str, Any]], names: Collection[str]) -> list[dict[str, Any]]:
    """Copies of messages with `GUARD` wherever their texts are, or touch, a special token.

    Names are sought in any case, since a template may change it. Whatever lies within a field, such as the arguments
    of a tool call, is searched for whole names alone.
    """
    known = _known(tuple(names))

    def guard(key: str, value: Any) -> Any:
        if key == "role" and value in ROLES:
            return value
        return known.fence(value) if isinstance(value, str) else _changed(value, known.split)

    return [{key: guard(key, value) for key, value in message.items()} for message in messages]


def guarded_within(value: Any, names: Collection[str]) -> Any:
    """A copy of a JSON value with `GUARD` in every special token that one of its texts spells, in any case."""
    return _changed(value, _known(tuple(names)).split)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(part, change) for key, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, Sequence) else value


class _Names(NamedTuple):
    """The names of special tokens, ready to be sought."""

    exact: re.Pattern[str]
    any_case: re.Pattern[str]
    starts: frozenset[str]
    """Proper prefixes in lower case."""
    ends: frozenset[str]
    """Proper suffixes."""
    lines: str
    """The names themselves."""
    longest: int

    def split(self, text: str) -> str:
        """The text with a guard within each name; one of a single character is replaced by it."""
        return self.any_case.sub(lambda found: (found[0][0] if len(found[0]) > 1 else "") + GUARD + found[0][1:], text)

    def fence(self, text: str) -> str:
        """`split`, and guards at the ends of a text that could complete a name together with its surroundings."""
        core = text.strip().lower()
        within = bool(core) and core in self.lines
        before = GUARD * (within or any(core[:length] in self.ends for length in range(1, self.longest)))
        after = GUARD * (within or any(core[-length:] in self.starts for length in range(1, self.longest)))
        text = self.split(text)
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        return text[:start] + before + text[start:end] + after + text[max(start, end) :]


@lru_cache(maxsize=16)
def _known(names: tuple[str, ...]) -> _Names:
    longest = max(map(len, names), default=0)
    one = f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'})"
    low = [name.lower() for name in names]
    starts, ends = (
        frozenset(part for name in low for part in (name[:cut] if first else name[cut:] for cut in range(1, len(name))))
        for first in (True, False)
    )
    return _Names(re.compile(one), re.compile(one, re.IGNORECASE), starts, ends, "\n".join(low), longest)
