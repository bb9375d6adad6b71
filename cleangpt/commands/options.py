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
    """tyro's message as a line, with the nearest right name.

    tyro draws a box: a title, a rule, the message, a rule, help; in ASCII where the output is not UTF-8.
    """
    sections = [""]
    for line in boxes.splitlines():
        if re.match(r"╭|[│ ]*[─-]{8,}[│ ]*$", line):
            sections.append("")
        else:
            sections[-1] += f" {line.strip('│ ')}"
    message = " ".join(sections[1].split()) if len(sections) > 1 else boxes.strip()
    if unknown := re.match(r"Unrecognized options: (\S+?)(?:[=,]| |$)", message):
        option = unknown.group(1)
        if not option.startswith("-"):
            return f"{option} is one word too many; see --help"
        return f"{option} is not an option{nearest(option.split('=')[0], known)}; see --help"
    if missing := re.match(r"Missing from [^:]*: (\S+)(?: \[STR.*?\])?\]? (.*?)(?: \(required\))?$", message):
        what = "an argument" if missing.group(1) == "STR" else missing.group(1)
        return f"{what} is missing: {missing.group(2)}; see --help"
    if choice := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)", message):
        value, option, allowed = choice.group(1), choice.group(2), choice.group(3).replace("'", "")
        return f"{option} is {value!r}; allowed: {allowed}{nearest(value, allowed.split(', '))}"
    if wrong := re.match(r"Error parsing (\S+?): .*?(?:(float)|int\b).*: ('.*')", message):
        return f"{wrong.group(1)} is {wrong.group(3)}; allowed: a {'' if wrong.group(2) else 'whole '}number"
    return message.rstrip(".") + "; see --help"
