"""export RUN: a run's best checkpoint for Hugging Face or llama.cpp"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from cleangpt.commands.fields import POSITIONAL
from cleangpt.commands.options import parse
from cleangpt.files import user_path
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.validation import Metavar


@dataclasses.dataclass
class Options:
    """Options of `cleangpt export`."""

    run: Annotated[str, POSITIONAL]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    format: Literal["hf", "gguf"] = "hf"
    """hf: a folder for Hugging Face's transformers; gguf: a file for llama.cpp (needs the package gguf)."""
    out: Annotated[str, Metavar("FOLDER|FILE")] | None = None
    """Folder or file to write; None: RUN-hf or RUN.gguf in the current folder."""
    force: bool = False
    """Replace an earlier export."""


def command(words: Sequence[str]) -> None:
    """Exports a checkpoint."""
    about = "Exports a run's best checkpoint to Hugging Face's format or to GGUF."
    options = parse(Options, words, program="cleangpt export", about=about)
    name = user_path(options.run.removeprefix("hf:")).resolve().name
    out = user_path(options.out or (f"{name}-hf" if options.format == "hf" else f"{name}.gguf"))
    export(open_checkpoint(options.run), options.format, out, options.force)
    print(f"export: {out}")
