"""The command `python -m tests.faults`: every fault, at every place, and a table of what was lost."""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from cleangpt.commands.fields import POSITIONAL
from cleangpt.commands.options import parse
from cleangpt.errors import UserError, nearest
from tests.faults import Fault, find_faults

HEAD = f"{'fault':<60} | {'tried':>5} | {'survived':>8} | {'lost':>4} | {'seconds':>7}"


@dataclass
class Options:
    """What to try."""

    names: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Rows of the table, or words in them; none: all."""
    tries: int | None = None
    """Try each this many times at most; none: as often as there are places for it."""
    seed: int = 0
    """Begin with this seed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries faults and prints the table; returns the exit code, 1 when anything was lost, 2 for a wrong command."""
    words = sys.argv[1:] if arguments is None else arguments
    faults = find_faults()
    try:
        options = parse(Options, words, program="python -m tests.faults", about="Faults, tried hard.")
        for word in options.names:
            if not any(word in name for name in faults):
                raise UserError(f"{word!r} is no fault{nearest(word, faults)}; allowed: {', '.join(faults)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:
        return int(end.code or 0)
    print(HEAD, "-" * len(HEAD), sep="\n", flush=True)
    losses: list[str] = []
    for name, fault in faults.items():
        if not options.names or any(word in name for word in options.names):
            losses += attempt(fault, options)
    print(*losses, sep="\n")  # once more, where they are found
    return 1 if losses else 0


def attempt(fault: Fault, options: Options) -> list[str]:
    """Tries one fault at its places and prints its row; returns a line about each loss."""
    began, tried, losses = time.monotonic(), 0, []
    last = min(fault.tries(), options.seed + (options.tries or sys.maxsize))
    for seed in range(options.seed, last):
        with tempfile.TemporaryDirectory(prefix="torture_", ignore_cleanup_errors=True) as folder:
            try:
                fault.trial(seed, Path(folder))
            except pytest.skip.Exception as reason:
                print(f"{fault.name}, {seed}: not tried: {reason}")
                continue
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[-1]
                losses.append(f"lost: {fault.name}, seed {seed}: {type(error).__name__}: {reason}")
        tried += 1
    seconds = time.monotonic() - began
    row = f"{fault.name:<60} | {tried:>5} | {tried - len(losses):>8} | {len(losses):>4} | {seconds:>7.1f}"
    print(row, *losses, sep="\n", flush=True)
    return losses


if __name__ == "__main__":
    sys.exit(main())
