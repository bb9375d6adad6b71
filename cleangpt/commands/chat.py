"""chat RUN: talk with a model that was trained on conversations"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from cleangpt.commands.options import FLAT, parse
from cleangpt.config import Device
from cleangpt.distributed.device import choose_device
from cleangpt.errors import UserError
from cleangpt.experiment_files import run_code
from cleangpt.inference.chat import answer
from cleangpt.inference.sampling import Sampling
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.validation import CountOrZero


@dataclasses.dataclass
class Options:
    """Options of `cleangpt chat`."""

    run: tyro.conf.Positional[str]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    message: str | None = None
    """Send this message, print the answer and exit; None: chat, one message per line, until an empty line."""
    system: str | None = None
    """System message at the start of the conversation."""
    max_new_tokens: CountOrZero = 500
    """Maximum number of tokens in an answer."""
    sampling: Annotated[Sampling, FLAT] = Sampling(temperature=0.8)  # noqa: RUF009 - frozen
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    code: str | None = None
    """Your own Python file to run first, which registers your own model."""


def command(words: Sequence[str]) -> None:
    """Answers messages until there are no more."""
    about = "Chat with a model that was trained on conversations."
    options = parse(Options, words, program="cleangpt chat", about=about)
    run_code(options.code)
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.run)
    if checkpoint.chat_template is None:
        raise UserError(
            f"{checkpoint.folder} has no chat template, since it was not trained on conversations; use sample"
        )
    model = checkpoint.model(device)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while message := options.message or _next_message():
        messages.append({"role": "user", "content": message})
        pieces = []
        for piece in answer(
            model, checkpoint.tokenizer, checkpoint.chat_template, messages, device,
            max_new_tokens=options.max_new_tokens, sampling=options.sampling,
        ):  # fmt: skip
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
        if options.message is not None:
            break


def _next_message() -> str:
    """The user's next message; empty at end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
