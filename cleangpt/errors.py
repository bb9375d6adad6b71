"""The one kind of exception that reaches a user as a single line, without a traceback."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """A mistake that its maker can mend: the message says what was wrong, where, and what to do.

    `cli.main` prints it as one line and exits with code 2; anything else is a bug and keeps its traceback.
    """


class RunFailedError(Exception):
    """A run that cannot go on: the message says why and where it can be taken up; exit code 1, no traceback."""


class DivergedError(RunFailedError):
    """A run whose losses or gradients are no longer finite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'dim'?``, or an empty string when nothing known is near `word`."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional `module`.

    Raises:
        UserError: it is not installed; names the extra of CleanGPT that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise UserError(
            f"this needs the package {error.name!r}, which is not installed: pip install 'cleangpt[{extra}]'"
        ) from None
