"""sample RUN: generate text with a run's best checkpoint"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch

from cleangpt.commands.fields import FLAT, POSITIONAL, VERBATIM
from cleangpt.commands.options import parse
from cleangpt.data.tokenizers import Tokenizer, same_tokens
from cleangpt.distributed.device import can_compile, choose_device
from cleangpt.errors import UserError
from cleangpt.inference.images import read_prompt
from cleangpt.inference.sampling import Sampling
from cleangpt.inference.text import TextChunk, complete, stream
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models.base import LanguageModel
from cleangpt.tracking.numbers import show_number
from cleangpt.validation import Count, CountOrZero, Device, File, Metavar, Pattern, RunOrModel


@dataclasses.dataclass
class Options:
    """Options of `cleangpt sample`."""

    run: Annotated[str, POSITIONAL]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    prompt: Annotated[str | None, VERBATIM, Metavar("TEXT")] = None
    """Text to continue; default: the start of a document."""
    image: tuple[File, ...] = ()
    """Pictures for a model that reads images, resized to the size that it reads, or cut into tiles of it; the prompt
    begins with them, or has <image> where each is to stand."""
    max_new_tokens: CountOrZero = 200
    """Maximum number of tokens to generate."""
    sampling: Annotated[Sampling, FLAT] = Sampling(temperature=0.8)  # noqa: RUF009 - frozen
    stop: tuple[Annotated[str, Pattern(r"(?s).+", "text of one character or more"), Metavar("TEXT")], ...] = ()
    """Generation stops before any of these texts."""
    num_samples: Count = 1
    """Number of texts; several are generated as one batch, with consecutive seeds, and printed at the end."""
    logprobs: bool = False
    """Print each token on its own line, with its log-probability in nats."""
    draft: RunOrModel | None = None
    """Speculative decoding: the draft model, given like the run; a smaller one with the same tokenizer."""
    draft_tokens: Count = 4
    """Tokens that the draft model proposes at a time."""
    cache: bool = True
    """Use a KV cache."""
    compile: bool = False
    """Compile the model: slower to start, faster per token."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def command(words: Sequence[str]) -> None:
    """Prints texts as they are generated."""
    options = parse(Options, words, program="cleangpt sample", about="Generates text with a run's best checkpoint.")
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.run)
    model, tokenizer = checkpoint.model(device), checkpoint.tokenizer
    compiled = options.compile and can_compile(device)
    if compiled != options.compile:
        print("--compile: no compiler was found; continuing without", file=sys.stderr)
    for number, text in enumerate(_generate(options, model, tokenizer, device, compiled)):
        if number:
            print("---")
        _show(text, options.prompt, options.logprobs)


def _generate(
    options: Options, model: LanguageModel, tokenizer: Tokenizer, device: torch.device, compiled: bool
) -> Iterable[Iterable[TextChunk]]:
    """The texts, each as the chunks in which it is generated."""
    sampling, prompt, count = options.sampling, options.prompt, options.num_samples
    images = read_prompt(model, tokenizer, prompt, options.image)
    given: dict[str, Any] = {
        "images": images, "max_new_tokens": options.max_new_tokens, "stop": options.stop, "cached": options.cache,
        "compiled": compiled,
    }  # fmt: skip
    if options.draft is None and count > 1:
        return complete(model, tokenizer, [prompt] * count, device, sampling=sampling, **given)
    draft = None if options.draft is None else _draft_model(options.draft, tokenizer, device)
    given |= {"draft": draft, "draft_tokens": options.draft_tokens}
    each = [dataclasses.replace(sampling, seed=sampling.seed + number) for number in range(count)]
    return (stream(model, tokenizer, prompt, device, sampling=one, **given) for one in each)


def _draft_model(text: str, tokenizer: Tokenizer, device: torch.device) -> LanguageModel:
    draft = open_checkpoint(text)
    if not same_tokens(draft.tokenizer, tokenizer):
        raise UserError(f"--draft is {text!r}, whose tokenizer differs; allowed: a model with the same tokenizer")
    return draft.model(device)


def _show(text: Iterable[TextChunk], prompt: str | None, logprobs: bool) -> None:
    """Prints a text as it is generated, or each of its tokens on a line.

    The prompt comes with the first piece: until then, it may turn out to be one that the model cannot continue.
    """
    before = prompt or ""
    for piece, token in text:
        if not logprobs:
            print(before + piece, end="", flush=True)
            before = ""
        elif token is not None or piece:
            print(f"{'' if token is None else show_number(token.logprob, 4):>9}  {piece!r}")
    if not logprobs:
        print()
