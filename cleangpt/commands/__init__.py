"""The command line: one file per command, imported when it is called, so that --help and --version are fast."""

import ast
import contextlib
import errno
import gc
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cleangpt import __version__
from cleangpt.errors import RunFailedError, UserError, nearest, single_line
from cleangpt.output import discard, say

COMMANDS = (
    "demo", "list", "prepare", "plan", "tune", "train", "resume", "evaluate", "sample", "chat", "report", "export",
)  # fmt: skip
"""Each is a file here; its docstring starts with usage and purpose, and `command(words)` runs it."""

UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""System errors of a path that cannot be a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (None: the process's own) and returns the exit code.

    0: done, or stopped by a signal after saving; 1: the run failed; 2: the command or its input was wrong;
    130: interrupted by Ctrl-C, in training by a second one.
    """
    _replace_what_output_lacks()
    words = [*(sys.argv[1:] if arguments is None else arguments)]  # `list` is a command here
    try:
        code = _dispatch(words)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error of it is told in a line
        return code
    except UserError as error:
        return _fail(f"error: {single_line(error)}", 2)
    except RunFailedError as error:
        return _fail(f"stopped: {single_line(error)}", 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted{'; the last snapshot is intact' * _trains(words)}", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        discard(sys.stdout)
        return 0
    except (OSError, MemoryError) as error:  # the machine's, whatever its kind
        return _fail(f"stopped: {single_line(error) or type(error).__name__}", 1)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))


def program() -> NoReturn:
    """Entry point of the command line: `main`, then an immediate exit.

    Python's final garbage collection would take half a second with PyTorch's objects.
    """
    code = main()
    gc.freeze()
    sys.exit(code)


def usage() -> str:
    """The usage of all commands, from the first lines of their docstrings."""
    calls = [_docstring(name).splitlines()[0].split(": ", 1) for name in COMMANDS]
    width = max(len(call) for call, _ in calls)
    return "\n".join([
        "usage: cleangpt COMMAND [ARGUMENTS] [--help]", "",
        *(f"  {call:<{width}}  {what}" for call, what in calls), "",
        "RUN is the folder of a run, or an experiment's name for its newest run.",
        "cleangpt COMMAND --help lists the options of a command. Every command takes --code FILE:",
        "your own Python file to run first, which registers your own models, corpora and objectives.",
    ])  # fmt: skip


def subject(words: Sequence[str], command: str, what: str, names: Callable[[], Sequence[str]]) -> str:
    """The first argument of a command, such as the name of an experiment.

    Raises:
        UserError: it is missing; lists what is allowed.
        SystemExit: with code 0, after --help.
    """
    if words and not words[0].startswith("-"):
        return words[0]
    if words and words[0] in ("-h", "--help"):
        print(f"usage: cleangpt {command} {what} [OPTIONS]\n\n{what} is one of: {', '.join(names())}")
        print(f"cleangpt {command} {what} --help lists the options.")
        raise SystemExit(0)
    raise UserError(f"cleangpt {command} needs {what}; allowed: {', '.join(names())}")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name in ("--version", "-V"):
        print(f"cleangpt {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command{nearest(name, COMMANDS)}; allowed: {', '.join(COMMANDS)}")
    try:
        rest = _run_code(rest)
        importlib.import_module(f"cleangpt.commands.{name}").command(rest)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error
    return 0


def _run_code(words: Sequence[str]) -> list[str]:
    """Runs the files given as ``--code FILE``; returns the other words.

    Raises:
        UserError: a file is missing or fails.
    """
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word != "--code" and not word.startswith("--code="):
            rest.append(word)
            continue
        file = word.removeprefix("--code=") if "=" in word else next(left, "")
        if not file:
            raise UserError("--code needs a value; allowed: a Python file")
        importlib.import_module("cleangpt.experiment_files").run_code(file)
    return rest


def _trains(words: Sequence[str]) -> bool:
    return words[0] in ("demo", "resume", "train", "tune")


def _replace_what_output_lacks() -> None:
    """Prints a question mark for a character that standard output cannot encode, instead of failing in mid-text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # it flushes, perhaps to a reader that has left
            sys.stdout.reconfigure(errors="replace")


def _docstring(name: str) -> str:
    """The docstring of a command's file, which is parsed, not imported."""
    path = Path(__file__).with_name(f"{name}.py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _fail(reason: str, code: int) -> int:
    """Tells why the program ends, and of which process, if torchrun has started several; returns its exit code."""
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    say(f"{rank}{reason}", sys.stderr)
    return code
