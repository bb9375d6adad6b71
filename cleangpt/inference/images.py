"""Prompts with images: the tokens that images stand at, and the images as the model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cleangpt.data.chat_template import ChatTemplate, Message, encode_prompt
from cleangpt.data.images import IMAGE_CHARACTER, IMAGE_TOKEN, IMAGES, expanded, image_token, reads_parts
from cleangpt.data.pictures import read_picture
from cleangpt.data.records import ENDS
from cleangpt.data.spelling import texts
from cleangpt.data.tiles import read_tiles
from cleangpt.data.tokenizers import BPETokenizer, CharTokenizer, Tokenizer
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.vision import vision_of


@dataclass(frozen=True)
class ImagePrompt:
    """Pictures of a prompt, each one image or several."""

    images: Tensor
    """`(images, height, width, channels)`, uint8."""
    token: int
    """The token that images stand at."""
    size: int
    """As many of them for each."""
    pictures: Sequence[Sequence[int]]
    """The tokens of each picture: that of images, once for each of its own, and others between them."""
    longest: int | None = None
    """Tokens of a prompt that the model sees as a whole; None: pictures may be cut off with its start."""

    def between(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], dict[str, Tensor]]:
        """Tokens and inputs, as in `Engine.submit`, of texts with a picture after each but the last.

        Raises:
            UserError: there are more or fewer pictures than that, or more tokens than `longest`.
        """
        if (places := len(texts) - 1) != (count := len(self.pictures)):
            raise UserError(_places(places, count))
        tokens, ends = list(texts[0]), list[int]()
        for picture, text in zip(self.pictures, texts[1:], strict=True):
            shown, within = expanded(np.array(picture), self.token, self.size)
            ends += (len(tokens) + within).tolist()
            tokens += [*shown.tolist(), *text]
        if self.longest is not None and len(tokens) > self.longest:
            raise UserError(
                f"the prompt has {len(tokens):,} tokens, of which {len(ends) * self.size:,} are pictures; allowed: at "
                f"most {self.longest:,}, or the model would not see the first"
            )
        return tokens, {IMAGES: self.images, f"{IMAGES}{ENDS}": torch.tensor(ends)}


def read_images(model: LanguageModel, tokenizer: Tokenizer, files: Sequence[Path | str]) -> ImagePrompt:
    """Picture files as images of a prompt, cut into tiles if the model reads them so.

    Raises:
        UserError: the model reads no images, a file cannot be decoded, or the tokenizer lacks a special token.
    """
    vision = vision_of(model.config)
    if vision.encoder is None:
        raise UserError(f"{files[0]} is given, but the model reads no images; allowed: one with model.vision.encoder")
    image = image_token(tokenizer)
    if vision.longest_edge:
        tiles = [read_tiles(file, vision.form, vision.longest_edge, vision.tiles) for file in files]
        images = np.concatenate([picture.images for picture in tiles])
        written = [picture.tokens(tokenizer) for picture in tiles]
    else:
        images = np.stack([read_picture(file, vision.form) for file in files])
        written = [[image]] * len(files)
    return ImagePrompt(torch.from_numpy(images), image, vision.tokens, written, model.max_seq_len)


def read_prompt(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str | None, files: Sequence[Path | str]
) -> ImagePrompt | None:
    """The images of a prompt; None without files.

    Raises:
        UserError: as `read_images`, or a model that reads images gets a prompt with a place for one, but no file.
    """
    prompt = prompt or ""
    if vision_of(model.config).encoder is not None:
        if IMAGE_CHARACTER in prompt and isinstance(tokenizer, CharTokenizer):
            raise UserError(f"the prompt has the character U+FFFC, which stands for a picture; write {IMAGE_TOKEN}")
        if not files and (places := prompt.count(IMAGE_TOKEN)):
            raise UserError(_places(places, 0))
    return read_images(model, tokenizer, files) if files else None


def _places(places: int, count: int) -> str:
    """The message about a prompt with more or fewer places than pictures."""
    return f"the prompt has {places} {IMAGE_TOKEN} for {count} picture{'s' * (count != 1)}; allowed: one for each"


def read_conversation(
    model: LanguageModel, tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[Message], list[int], dict[str, Tensor]]:
    """A conversation with picture files in its messages, as `{"type": "image", "path": FILE}` parts of their contents.

    Returns:
        The messages as the template reads them, the tokens up to where the next answer starts, and the inputs of the
        model besides them.

    Raises:
        UserError: the model reads no images, a file cannot be decoded, the template does not write every picture, or
            the model would not see one of the last message.
    """
    files = [part["path"] for message in messages for part in _parts(message) if "path" in part]
    shown = [_without_files(message, reads_parts(template)) for message in messages]
    if not files:
        return shown, encode_prompt(template, tokenizer, shown), {}
    pictures = read_images(model, tokenizer, files)
    if not any("path" in part for part in _parts(messages[-1])):
        pictures = replace(pictures, longest=None)  # a long conversation loses its start, as one of text does
    if any(IMAGE_CHARACTER in text for text in texts(messages)):
        raise UserError("a message has the character U+FFFC, which stands for a picture; remove it")
    name = IMAGE_TOKEN if isinstance(tokenizer, BPETokenizer) else IMAGE_CHARACTER
    ids = np.array(encode_prompt(template, tokenizer, shown, (IMAGE_CHARACTER, name)))
    first, *rest = np.split(ids, np.flatnonzero(ids == pictures.token))
    if len(rest) != len(files):
        raise UserError(f"the chat template writes {len(rest)} of {len(files)} pictures")
    return shown, *pictures.between([first.tolist(), *(after[1:].tolist() for after in rest)])


def _parts(message: Message) -> list[dict[str, str]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _without_files(message: Message, in_parts: bool) -> Message:
    """The message as a template reads it: with parts, or with one text, in which a character stands for a picture."""
    if isinstance(message["content"], str) and not in_parts:
        return message
    parts = _parts(message)
    if in_parts:
        content: Any = [{"type": "image"} if "path" in part else part for part in parts]
    else:
        content = "".join(IMAGE_CHARACTER if "path" in part else part["text"] for part in parts)
    return {**message, "content": content}
