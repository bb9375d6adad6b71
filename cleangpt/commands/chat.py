"""chat RUN: talk with a model that was trained on conversations"""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cleangpt.commands.fields import FLAT, POSITIONAL, VERBATIM
from cleangpt.commands.options import parse
from cleangpt.distributed.device import choose_device
from cleangpt.errors import UserError
from cleangpt.inference.chat import answer
from cleangpt.inference.sampling import Sampling
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.validation import CountOrZero, Device, File, Metavar


@dataclasses.dataclass
class Options:
    """Options of `cleangpt chat`."""

    run: Annotated[str, POSITIONAL]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    message: Annotated[str | None, VERBATIM, Metavar("TEXT")] = None
    """Send this message, print the answer and exit; default: chat, one message per line, until an empty line."""
    image: tuple[File, ...] = ()
    """Pictures that the first message begins with, for a model that reads images."""
    system: Annotated[str | None, VERBATIM, Metavar("TEXT")] = None
    """System message at the start of the conversation."""
    max_new_tokens: CountOrZero = 500
    """Maximum number of tokens in an answer."""
    sampling: Annotated[Sampling, FLAT] = Sampling(temperature=0.8)  # noqa: RUF009 - frozen
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def command(words: Sequence[str]) -> None:
    """Answers messages until there are no more."""
    about = "Chat with a model that was trained on conversations."
    options = parse(Options, words, program="cleangpt chat", about=about)
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.run)
    template = checkpoint.chat_template
    if template is None:
        raise UserError(
            f"{checkpoint.folder} has no chat template, since it was not trained on conversations; use sample"
        )
    model = checkpoint.model(device)
    messages: list[dict[str, Any]] = [{"role": "system", "content": options.system}] if options.system else []
    pictures: list[dict[str, str]] = [{"type": "image", "path": file} for file in options.image]

    def respond(message: str) -> None:
        first = all(earlier["role"] == "system" for earlier in messages)
        content = [*pictures, {"type": "text", "text": message}] if pictures and first else message
        messages.append({"role": "user", "content": content})
        pieces: list[str] = []
        try:
            for piece in answer(
                model, checkpoint.tokenizer, template, messages, device,
                max_new_tokens=options.max_new_tokens, sampling=options.sampling,
            ):  # fmt: skip
                print(piece, end="", flush=True)
                pieces.append(piece)
        finally:
            print()
            messages.append({"role": "assistant", "content": "".join(pieces)})

    if options.message:
        respond(options.message)
        return
    _edit_lines()
    while message := _next_message():
        with contextlib.suppress(KeyboardInterrupt):  # it ends the answer, and the conversation goes on
            respond(message)


def _edit_lines() -> None:
    """Lets `input` edit lines and recall earlier ones, where Python has readline."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")


def _next_message() -> str:
    """The user's next message; empty at the end of the input, and after Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
