"""Errors that are shown to the user as a single line, without a traceback."""

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType


class UserError(Exception):
    """A mistake the user can fix: the message says what is wrong, where, and what to do.

    `commands.main` prints it as one line and exits with code 2, errors of the system likewise with code 1; anything
    else is a bug and keeps its traceback.
    """


class RunFailedError(Exception):
    """A run that cannot continue: the message says why, and where to resume; exit code 1, no traceback."""


class DivergedError(RunFailedError):
    """A run whose loss, gradients or weights are no longer finite."""


MAX_LINE_LENGTH = 1000
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
def parsing(path: object, *also: type[Exception]) -> Iterator[None]:
    """Turns errors while a file's content is parsed into a `UserError`, since an untrusted file may hold anything.

    Args:
        path: the file to name.
        also: types of error to convert besides `PARSE_ERRORS`.

    Raises:
        UserError: parsing failed; names the file.
    """
    try:
        yield
    except PARSE_ERRORS + also as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path} is not what CleanGPT writes: {type(error).__name__}: {reason}") from error


def single_line(error: Exception) -> str:
    """An error's message as one printable line of limited length, whatever untrusted text it quotes."""
    text = " ".join(str(error).split())
    text = text if len(text) <= MAX_LINE_LENGTH else f"{text[:MAX_LINE_LENGTH]}…"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'dim'?``, or an empty string if no known word is similar."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


DISTRIBUTIONS = {"ale_py": "ale-py", "PIL": "pillow", "sklearn": "scikit-learn"}
"""Packages that are installed under another name than they are imported by."""


def require(module: str) -> ModuleType:
    """Imports an optional `module`.

    Raises:
        UserError: its package is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or package != error.name.split(".")[0]:
            raise
        package = DISTRIBUTIONS.get(package, package)
        raise UserError(f"this needs the package {package}, which is not installed: pip install {package}") from None
