"""The command `python -m benchmarks.gpu`: every row in a process of its own, in order of worth, until time is up.

First the rows that are not timed, side by side, since time on a GPU is dear; then those that are, one after another.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from benchmarks import machine
from benchmarks.gpu.journal import UNFINISHED, Outcome, append, read, write_table
from benchmarks.gpu.rows import ROWS, Row
from benchmarks.gpu.setup import PROJECT, Setup
from cleangpt.commands.fields import POSITIONAL
from cleangpt.commands.options import parse
from cleangpt.errors import UserError, nearest

TABLE = ".md"
BACK = ("failed", "timed out", UNFINISHED)
"""Rows that a second call tries again, after those that were never run."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
WRITING = threading.Lock()
"""Held while the table is written."""
CORES = 2
"""Cores for each of the rows that run side by side."""
TOY_PATIENCE = 5
"""Factor on the time limits of rows in a toy run, on what may be a busy machine."""


@dataclass
class Options:
    """What to measure, and for how long."""

    names: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Names of rows; empty: all."""
    minutes: float = 8.0
    """Time for all rows; what does not fit is named, and a second call goes on with it."""
    peer: Path | None = None
    """A checkout of nanoGPT, to compare with."""
    text: Path | None = None
    """The text of Tiny Shakespeare, for runs to a loss; None: the one that the checkout has prepared."""
    results: Path = Path("runs/gpu.jsonl")
    """Results, kept line by line; the table is written beside it, with the ending .md."""
    folder: Path = Path("runs/gpu")
    """Folder for temporary files; about 10 GB."""
    again: bool = False
    """Measure rows again that are done."""
    toy: bool = False
    """On the CPU at toy size, to see that every row works; the numbers mean nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rows that are missing; returns the exit code: 1 if one failed, 2 for a wrong command line."""
    about = "CleanGPT on one GPU: correctness, speed, runs to a loss, generation, plans."
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(Options, words, program="python -m benchmarks.gpu", about=about)
        chosen = choose(options.names)
        setup = make_setup(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{setup.card}; results: {setup.results}", flush=True)
    deadline = time.monotonic() + 60 * options.minutes
    before = read(setup.results).get(setup.card, {})
    rows = list(missing(chosen, {} if options.again else before))
    run = partial(run_in_time, setup=setup, deadline=deadline)
    left = side_by_side(run, [row for row in rows if not row.timed])
    left += [run(row) for row in rows if row.timed]
    outcomes = read(setup.results).get(setup.card, {})
    return report(chosen, outcomes, list(filter(None, left)))


def side_by_side(run: Callable[[Row], str], rows: Sequence[Row]) -> list[str]:
    """What `run` returns for each row, several at a time."""
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES))
    try:
        return list(pool.map(run, rows))
    except KeyboardInterrupt:  # threads that wait for rows keep a process, and the rows end with it
        os._exit(INTERRUPTED)
    finally:
        pool.shutdown()


def run_in_time(row: Row, setup: Setup, deadline: float) -> str:
    """Runs a row if there is time for it; returns why not, empty if it ran."""
    seconds, limit = deadline - time.monotonic(), row.seconds * setup.size(1, TOY_PATIENCE)
    if seconds < limit / 4:
        return f"{row.name} (not started: {max(seconds, 0):.0f} s left, may take {limit})"
    folder = setup.folder / f"{os.getpid()}_{row.name.replace(' ', '_').replace(',', '')}"
    run_row(row, replace(setup, folder=folder), min(seconds, limit))
    return ""


def choose(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in order of worth; without names, all.

    Raises:
        UserError: there is no row of that name.
    """
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is not a row{nearest(name, known)}; allowed: {', '.join(map(repr, known))}")
    return [row for row in ROWS if row.name in names or not names]


def make_setup(options: Options) -> Setup:
    """What the rows get.

    Raises:
        UserError: there is no GPU, or a path does not exist.
    """
    if not options.toy and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --toy runs every row on the CPU, at toy size")
    for name, path in (("peer", options.peer), ("text", options.text)):
        if path is not None and not path.exists():
            raise UserError(f"--{name} is {str(path)!r}, which does not exist")
    card = "cpu, toy sizes" if options.toy else torch.cuda.get_device_name(0)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    peer, text = (path and path.resolve() for path in (options.peer, options.text))
    return Setup(options.folder.resolve(), options.results.resolve(), card, options.toy, peer, text)


def missing(rows: Sequence[Row], outcomes: dict[str, Outcome]) -> Iterator[Row]:
    """The rows that are not done: first those that were never run, then those that failed or took too long."""
    for back in (False, True):
        for row in rows:
            status = outcomes[row.name].status if row.name in outcomes else ""
            if status != "done" and (status in BACK) == back:
                yield row


def run_row(row: Row, setup: Setup, seconds: float) -> None:
    """Runs a row in a process of its own, which is killed with all that it started after `seconds`."""
    print(f"{row.name}, up to {seconds:.0f} s", flush=True)
    append(setup.results, "start", setup.card, row.name, machine=f"{machine.facts()}, CUDA {torch.version.cuda}")
    command = [sys.executable, "-m", "benchmarks.gpu.child", row.name, row.function, setup.to_json()]
    began = time.monotonic()
    environment = {**({} if row.timed else {"OMP_NUM_THREADS": str(CORES)}), **os.environ}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        reason = f"the process ended with exit code {code}"
        status = "failed"
    except subprocess.TimeoutExpired:
        status, reason = "timed out", f"after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(setup.folder, ignore_errors=True)
    taken = time.monotonic() - began
    if read(setup.results)[setup.card][row.name].status == UNFINISHED:
        append(setup.results, "end", setup.card, row.name, status=status, reason=reason, seconds=taken)
    with WRITING:
        write_table(setup.results.with_suffix(TABLE), read(setup.results), [row.name for row in ROWS])
    outcome = read(setup.results)[setup.card][row.name]
    print(f"{row.name} {outcome.status} in {taken:.0f} s{': ' * bool(outcome.reason)}{outcome.reason}", flush=True)


def report(rows: Sequence[Row], outcomes: dict[str, Outcome], left: Sequence[str]) -> int:
    """Prints what is left out, what failed and which goals were missed; returns the exit code."""
    named = [*left]
    failed = 0
    for row in rows:
        outcome = outcomes.get(row.name)
        if outcome is None or outcome.status == "done":
            continue
        failed += outcome.status in BACK
        named.append(f"{row.name} ({outcome.status}: {outcome.reason})")
    missed = [
        f"{row.name}: {entry.what}"
        for row in rows if row.name in outcomes
        for entry in outcomes[row.name].measurements if entry.met is False
    ]  # fmt: skip
    for title, entries in (("left out", named), ("goals missed", missed)):
        print(f"{title}: {'; '.join(entries) or 'none'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
