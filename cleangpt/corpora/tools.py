"""The tools of a conversation: functions that the assistant may call, as a line or row of data lists them."""

import json
from typing import Any

from cleangpt.data.chat_template import Tools, check_characters
from cleangpt.errors import UserError

IGNORED = "conversations with tools that are not in the text"
"""A count on the card."""


def tools_in(entry: Any, name: str, location: str) -> Tools | None:
    """The tools in the field `name` of a line or row, as chat templates expect them; None: there are none.

    They are JSON schemas, or texts with these, since all objects in a column of Parquet have the same fields.

    Raises:
        UserError: they are something else; the message starts with `location`.
    """
    given = entry.get(name) if isinstance(entry, dict) else None
    listed = _parsed(given, name, location)
    if listed is None:
        return None
    tools = [_parsed(tool, name, location) for tool in listed] if isinstance(listed, list) else listed
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{location}: {_kind(tools)} in the field {name!r}; allowed: a list of JSON schemas, one object per tool, "
            "also as text; set corpus.tools_field"
        )
    check_characters(tools, f"{location}: the field {name!r}")
    return tools


def _parsed(value: Any, name: str, location: str) -> Any:
    """A value, or what it says in JSON if it is text; an empty text is None."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location}: the text in the field {name!r} is not valid JSON: {error}; set corpus.tools_field"
        ) from None


def _kind(tools: Any) -> str:
    """What stands where a list of objects should be."""
    if not isinstance(tools, list):
        return type(tools).__name__
    return next(f"a list with {type(tool).__name__}" for tool in tools if not isinstance(tool, dict))
