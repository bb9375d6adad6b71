"""The command `python -m benchmarks`."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

from benchmarks import machine
from benchmarks.runner import Row, Setup, section, write_section
from cleangpt.commands.fields import POSITIONAL
from cleangpt.commands.options import parse
from cleangpt.errors import UserError, nearest

BENCHMARKS = (
    "loader", "store", "step", "snapshot", "resume", "parallel", "generation", "preferences", "rollouts", "ppo",
    "images", "control", "cartpole", "vs_nanogpt",
)  # fmt: skip
RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass
class Options:
    """What to measure."""

    names: Annotated[tuple[str, ...], POSITIONAL] = ()
    """loader, store, step, snapshot, resume, parallel, generation, preferences, rollouts, ppo, images, control,
    cartpole, vs_nanogpt; empty: all."""
    quick: bool = False
    """Smoke test: small sizes and few repetitions; results are not written."""
    peer: Path | None = None
    """A checkout of nanoGPT, to compare steps, generation and complete runs with."""
    text: Path | None = None
    """The text of Tiny Shakespeare, for complete runs; None: download it."""
    folder: Path = Path("runs")
    """Folder for temporary files, at most 4 GB, on the disk to be measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs benchmarks and writes their sections of RESULTS.md; returns the exit code, 2 for a wrong command line."""
    about = "CleanGPT against its peers and limits; results go to benchmarks/RESULTS.md."
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(Options, words, program="python -m benchmarks", about=about)
        for name in options.names:
            if name not in BENCHMARKS:
                allowed = ", ".join(BENCHMARKS)
                raise UserError(f"{name!r} is not a benchmark{nearest(name, BENCHMARKS)}; allowed: {allowed}")
        for name in options.names or BENCHMARKS:
            text = measure(name, options)
            print(f"## {name}\n\n{text}", flush=True)
            if not options.quick:
                write_section(RESULTS, name, text, BENCHMARKS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(name: str, options: Options) -> str:
    """Runs one benchmark in a temporary folder; returns its section."""
    facts = machine.facts()
    module = import_module(f"benchmarks.{name}")
    run: Callable[[Setup], list[Row]] = module.run
    options.folder.mkdir(parents=True, exist_ok=True)
    # Windows does not remove a file that is still mapped.
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.folder, ignore_cleanup_errors=True) as folder:
        return section(module.__doc__ or "", facts, run(Setup(Path(folder), options.quick, options.peer, options.text)))


if __name__ == "__main__":
    sys.exit(main())
