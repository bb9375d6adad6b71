"""Text from a model: prompts in, text out."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import StreamDecoder, Tokenizer, eos_ids
from cleangpt.errors import UserError
from cleangpt.inference.engine import Token, generate
from cleangpt.inference.sampling import Sampling
from cleangpt.inference.speculative import speculate
from cleangpt.models.base import LanguageModel

PROMPT_TOKENS = 16


def sample_text(
    model: LanguageModel, store: TokenDataset, prompt: str | None, count: int, device: torch.device, seed: int
) -> str:
    """A prompt and up to `count` tokens that the model adds to it at temperature 0.8, to show how far it has come."""
    tokens = (torch.from_numpy(store.tokenizer.encode(prompt)) if prompt else validation_prompt(store)).tolist()
    was_training = model.training
    model.eval()
    drawn = generate(
        model, [tokens], device, max_new_tokens=count, sampling=Sampling(temperature=0.8, seed=seed),
        vocab_size=store.vocab_size, ends=eos_ids(store.tokenizer),
    )  # fmt: skip
    text = store.tokenizer.decode([*tokens, *(token.id for (token,) in drawn if token is not None)])
    model.train(was_training)
    return text


def validation_prompt(store: TokenDataset) -> Tensor:
    """Where the validation split begins: the question of the first row, or the first 16 tokens."""
    split = store.splits["val"]
    length = min(PROMPT_TOKENS, split.tokens)
    if split.masked and split.row_length is not None:
        length = int(split.read_mask(0, split.row_length).argmax())
    return torch.from_numpy(split.read(0, length).astype("int64"))


class Piece(NamedTuple):
    """Text that a token made whole; most often its own."""

    text: str
    token: Token | None
    """None for what was held back until the end."""


class Writer:
    """Text of one row as its tokens come: no character in halves, and nothing from a stop text on.

    Args:
        tokenizer: of the tokens.
        stop: texts before which the row ends; what may be the start of one is held back until that is clear.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop, self._held = StreamDecoder(tokenizer), tuple(stop), ""
        self.stopped = False
        """Whether a stop text has come."""

    def push(self, token: int) -> str:
        """The text that a token adds to what can be given out."""
        return self._give_out(self._decoder.push(token), last=False)

    def flush(self) -> str:
        """The text that is left when no more tokens come."""
        return self._give_out(self._decoder.flush(), last=True)

    def _give_out(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        held = 0 if last or found else max((_overlap(text, stop) for stop in self._stop), default=0)
        end = min(found) if found else len(text) - held
        self._held = "" if found else text[end:]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | None,
    device: torch.device,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    draft: LanguageModel | None = None,
    draft_tokens: int = 4,
    cached: bool = True,
    compiled: bool = False,
) -> Iterator[Piece]:
    """The text that a model adds to a prompt (None: to the start of a document), as it comes.

    With a `draft`, a smaller model of the same tokenizer, that one guesses tokens ahead; see `speculate`.

    Raises:
        UserError: the prompt has a character that the tokenizer does not know.
    """
    ids, ends = prompt_tokens(tokenizer, prompt), eos_ids(tokenizer)
    drawn: Iterator[Token | None]
    if draft is not None:
        drawn = speculate(
            model, draft, ids, device, max_new_tokens=max_new_tokens, draft_tokens=draft_tokens, sampling=sampling,
            vocab_size=tokenizer.vocab_size, ends=ends, compiled=compiled,
        )  # fmt: skip
    else:
        rows = generate(
            model, [ids], device, max_new_tokens=max_new_tokens, sampling=sampling, vocab_size=tokenizer.vocab_size,
            ends=ends, cached=cached, compiled=compiled,
        )  # fmt: skip
        drawn = (token for (token,) in rows)
    writer = Writer(tokenizer, stop)
    for token in drawn:
        assert token is not None
        yield Piece(writer.push(token.id), token)
        if writer.stopped:
            return
    yield Piece(writer.flush(), None)


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | None],
    device: torch.device,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    cached: bool = True,
    compiled: bool = False,
) -> list[list[Piece]]:
    """What `stream` gives for each of several prompts, all read side by side; the seed of each is one higher.

    Raises:
        UserError: a prompt has a character that the tokenizer does not know.
    """
    writers, pieces = [Writer(tokenizer, stop) for _ in prompts], [list[Piece]() for _ in prompts]
    drawn = generate(
        model, [prompt_tokens(tokenizer, prompt) for prompt in prompts], device, max_new_tokens=max_new_tokens,
        sampling=sampling, vocab_size=tokenizer.vocab_size, ends=eos_ids(tokenizer), cached=cached,
        compiled=compiled,
    )  # fmt: skip
    for tokens in drawn:
        for writer, row, token in zip(writers, pieces, tokens, strict=True):
            if token is not None and not writer.stopped:
                row.append(Piece(writer.push(token.id), token))
        if all(writer.stopped for writer in writers):
            break
    for writer, row in zip(writers, pieces, strict=True):
        if not writer.stopped:
            row.append(Piece(writer.flush(), None))
    return pieces


def prompt_tokens(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """The tokens of a prompt, at least one: without a text, the one before a document.

    That is end of text, else a line's end, else the first token.
    """
    if prompt:
        return [int(token) for token in tokenizer.encode(prompt)]
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    try:
        return [int(tokenizer.encode("\n")[0])]
    except UserError:
        return [0]
