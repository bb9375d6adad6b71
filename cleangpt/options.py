"""Command lines over dataclasses, by tyro; what is wrong with one is told in a single line."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from cleangpt.errors import UserError, nearest

T = TypeVar("T")
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)


def parse(kind: type[T], arguments: Sequence[str], *, program: str, default: T | None = None, about: str = "") -> T:
    """The dataclass that a command line describes, over `default` where given.

    Raises:
        UserError: one line naming the option, its value and what is allowed.
        SystemExit: with code 0, after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            chosen: T = tyro.cli(
                kind, args=list(arguments), default=default, prog=program, description=about, config=CONFIG
            )  # type: ignore[assignment]
            return chosen
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(_one_line(said.getvalue(), option_names(kind, default, program))) from None


def option_names(kind: type[Any], default: Any, program: str) -> list[str]:
    """Every option that tyro gives a dataclass, such as ``--optimizer.lr``."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], default=default, prog=program, config=CONFIG)
    return sorted(set(re.findall(r"--[a-z][\w.-]*", text.getvalue())))


def _one_line(boxes: str, known: Sequence[str]) -> str:
    """tyro's boxed message as a line: the text of the box up to its first rule, and the nearest right name."""
    lines = [line.strip("│ ").strip() for line in boxes.splitlines() if line.startswith("│")]
    message = " ".join(line for line in "\n".join(lines).split("─" * 8)[0].splitlines() if line)
    if unknown := re.match(r"Unrecognized options: (\S+?)(?:[=,]| |$)", message):
        option = unknown.group(1)
        if not option.startswith("-"):
            return f"{option} is one word too many; see --help"
        return f"{option} is not an option{nearest(option.split('=')[0], known)}; see --help"
    return message.rstrip(".") + "; see --help"
