"""The one kind of exception that reaches a user as a single line, without a traceback."""

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType


class UserError(Exception):
    """A mistake that its maker can mend: the message says what was wrong, where, and what to do.

    `commands.main` prints it as one line and exits with code 2; anything else is a bug and keeps its traceback.
    """


class RunFailedError(Exception):
    """A run that cannot go on: the message says why and where it can be taken up; exit code 1, no traceback."""


class DivergedError(RunFailedError):
    """A run whose losses or gradients are no longer finite."""


LONGEST_LINE = 1000
PARSE_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def parsing(place: object, *also: type[Exception]) -> Iterator[None]:
    """Blames a file for what fails while its content is taken apart, since a stranger's may hold anything.

    Args:
        place: the file.
        also: kinds of error to blame it for, besides those of Python's own operations.

    Raises:
        UserError: something failed; names the `place`.
    """
    try:
        yield
    except PARSE_ERRORS + also as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{place} is not what CleanGPT writes: {type(error).__name__}: {reason}") from error


def single_line(error: Exception) -> str:
    """What an error says, as one line that is fit for a terminal, whatever a file or a word put into it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}…"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


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
