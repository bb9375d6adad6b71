"""Text from a model: prompts in, text out."""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import IMAGE_TOKEN, IMAGES, image_token
from cleangpt.data.records import records_of_row
from cleangpt.data.tokenizers import StreamDecoder, Tokenizer
from cleangpt.errors import UserError, require
from cleangpt.files import write_bytes
from cleangpt.inference.engine import Engine, Token
from cleangpt.inference.images import ImagePrompt
from cleangpt.inference.sampling import Sampling
from cleangpt.inference.speculative import speculate
from cleangpt.models.base import LanguageModel

PROMPT_TOKENS = 16
SAMPLE_IMAGE = "sample_{}.png"
"""File of an image in a run, by its number from 0."""


def sample_text(
    model: LanguageModel, dataset: TokenDataset, prompt: str | None, count: int, device: torch.device, seed: int
) -> str:
    """A prompt (None: the start of the validation split) and up to `count` generated tokens, at temperature 0.8."""
    tokens = start_of_sample(dataset, prompt)
    was_training = model.training
    model.eval()
    engine = Engine(model, device, vocab_size=dataset.vocab_size, eos_ids=dataset.tokenizer.stop_ids)
    inputs = {} if prompt else first_records(dataset, len(tokens))
    sampling = Sampling(temperature=0.8, seed=seed)
    generated = [token.id for token in stream_tokens(engine, tokens, count, sampling, inputs=inputs)]
    model.train(was_training)
    streamer = TextStreamer(dataset.tokenizer)
    if IMAGES in inputs:
        image = image_token(dataset.tokenizer)
        tokens = [token for token in tokens if token != image]
    return "".join(map(streamer.push, [*tokens, *generated])) + streamer.flush(cut=len(generated) == count)


def start_of_sample(dataset: TokenDataset, prompt: str | None) -> list[int]:
    """The tokens of a prompt (None: the start of the validation split), at least one.

    Raises:
        UserError: the tokenizer does not know a character of the prompt, or makes no tokens of it.
    """
    tokens = [int(token) for token in (dataset.tokenizer.encode(prompt) if prompt else validation_prompt(dataset))]
    if not tokens:
        raise UserError("the tokenizer makes no tokens of it; allowed: a text with tokens")
    return tokens


def validation_prompt(dataset: TokenDataset) -> Tensor:
    """The start of the validation split: the question of its first row, or at most 16 tokens, of whole characters."""
    split = dataset.splits["val"]
    if split.masked and split.row_length is not None:
        length = max(1, int(split.read_mask(0, split.row_length).argmax()))
        return torch.from_numpy(split.read(0, length).astype("int64"))
    tokens = split.read(0, min(PROMPT_TOKENS, split.tokens)).astype("int64")
    decoder, length = StreamDecoder(dataset.tokenizer), 1
    for number, token in enumerate(tokens.tolist(), start=1):
        decoder.push(token)
        length = number if decoder.whole else length
    return torch.from_numpy(tokens[:length])


def save_sample_images(dataset: TokenDataset, run: Path) -> None:
    """Writes the images at the start of the validation split, which texts are sampled after, as `SAMPLE_IMAGE`."""
    images = first_records(dataset, len(start_of_sample(dataset, None))).get(IMAGES, torch.zeros(0))
    for number, image in enumerate(images.numpy()):
        if not (path := run / SAMPLE_IMAGE.format(number)).exists():
            file = io.BytesIO()
            require("PIL.Image").fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
            write_bytes(path, file.getvalue())


def first_records(dataset: TokenDataset, length: int) -> dict[str, Tensor]:
    """The images and other records among the first tokens of the validation split."""
    return records_of_row(dataset.splits["val"].records, 0, length)


def stream_tokens(
    engine: Engine, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_ids: Collection[int] = (),
    inputs: Mapping[str, Tensor] | None = None,
) -> Iterator[Token]:  # fmt: skip
    """Streams the tokens generated after one prompt, without a stop token; for `inputs`, see `Engine.submit`."""
    request_id = engine.submit(
        prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, inputs=inputs
    )
    for outputs in engine.steps():
        token, reason = outputs[request_id]
        if reason != "stop":
            yield token


class TextChunk(NamedTuple):
    """A token and the text that it completes, usually its own."""

    text: str
    token: Token | None
    """None for text held back until the end."""


class TextStreamer:
    """Turns the tokens of one row into text as they come: only complete characters, and nothing from a stop text on.

    Args:
        tokenizer: of the tokens.
        stop: texts that end the row; a possible start of one is held back until it is certain.
        begins: whether the row begins a text; else it continues a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), begins: bool = True) -> None:
        self._decoder, self._stop, self._held = StreamDecoder(tokenizer, begins), tuple(stop), ""
        self.stopped = False
        """Whether a stop text has been generated."""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that can be shown now."""
        return self._release(self._decoder.push(token), last=False)

    def flush(self, cut: bool = False) -> str:
        """The remaining text, after the last token; without half a character if more tokens were `cut` off."""
        return self._release(self._decoder.flush(cut), last=True)

    def _release(self, text: str, last: bool) -> str:
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
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
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
    images: ImagePrompt | None = None,
) -> Iterator[TextChunk]:
    """Streams the text that a model generates after `images` and a prompt (None: the start of a document).

    With a `draft` model, a smaller one with the same tokenizer, decoding is speculative.

    Raises:
        UserError: the tokenizer does not know a character of the prompt, or there is a draft model besides images.
    """
    (tokens, inputs), ends = prompt_inputs(tokenizer, prompt, images), tokenizer.stop_ids
    if draft is not None and inputs:
        raise UserError("there are images and a draft model; allowed: one of them")
    if draft is not None:
        generated = speculate(
            model, draft, tokens, device, max_new_tokens=max_new_tokens, draft_tokens=draft_tokens, sampling=sampling,
            vocab_size=tokenizer.vocab_size, stop_ids=ends, compiled=compiled,
        )  # fmt: skip
    else:
        engine = Engine(
            model, device, vocab_size=tokenizer.vocab_size, eos_ids=ends, cached=cached, compiled=compiled
        )  # fmt: skip
        generated = stream_tokens(engine, tokens, max_new_tokens, sampling, inputs=inputs)
    streamer, count = TextStreamer(tokenizer, stop, begins=not prompt), 0
    for token in generated:
        count += 1
        yield TextChunk(streamer.push(token.id), token)
        if streamer.stopped:
            return
    yield TextChunk(streamer.flush(cut=count == max_new_tokens), None)


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
    images: ImagePrompt | None = None,
) -> list[list[TextChunk]]:
    """The chunks that `stream` would yield for each of several prompts, generated as one batch, with consecutive seeds.

    Raises:
        UserError: the tokenizer does not know a character of a prompt.
    """
    engine = Engine(
        model, device, vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.stop_ids, cached=cached, compiled=compiled
    )  # fmt: skip
    streamers = [TextStreamer(tokenizer, stop, begins=not prompt) for prompt in prompts]
    chunks = [list[TextChunk]() for _ in prompts]
    rows = dict[int, int]()
    for number, prompt in enumerate(prompts):
        tokens, inputs = prompt_inputs(tokenizer, prompt, images)
        request_id = engine.submit(
            tokens, max_new_tokens=max_new_tokens, sampling=sampling, seed=sampling.seed + number, inputs=inputs
        )
        rows[request_id] = number
    for outputs in engine.steps():
        for request_id, (token, reason) in outputs.items():
            streamer, row = streamers[rows[request_id]], chunks[rows[request_id]]
            if reason != "stop":
                row.append(TextChunk(streamer.push(token.id), token))
            if streamer.stopped:
                engine.cancel(request_id)
    for streamer, row in zip(streamers, chunks, strict=True):
        if not streamer.stopped:
            row.append(TextChunk(streamer.flush(cut=len(row) == max_new_tokens), None))
    return chunks


def prompt_inputs(
    tokenizer: Tokenizer, prompt: str | None, images: ImagePrompt | None
) -> tuple[list[int], dict[str, Tensor]]:
    """Tokens and other inputs of a prompt, which may be empty if it has images.

    These stand where the prompt says `<image>`, and before all of it if it does not.
    """
    if images is None:
        return prompt_tokens(tokenizer, prompt), {}
    written, start = prompt or "", len(tokenizer.prefix)
    texts = written.split(IMAGE_TOKEN) if IMAGE_TOKEN in written else [""] * len(images.pictures) + [written]
    ids = [tokenizer.encode(text).tolist() if text else list(tokenizer.prefix) for text in texts]
    return images.between([ids[0], *(text[start:] for text in ids[1:])])


def prompt_tokens(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """The tokens of a prompt, at least one: without a text, those that precede the first of a document.

    These are the tokenizer's prefix, else the end of text, else a line end, else the first token of the vocabulary.
    """
    if prompt:
        return [int(token) for token in tokenizer.encode(prompt)]
    if tokenizer.prefix:
        return list(tokenizer.prefix)
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    try:
        return [int(tokenizer.encode("\n")[0])]
    except UserError:
        return [0]
