"""Images as a dataset's records, and the token that marks their places."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.chat_template import ChatTemplate
from cleangpt.data.records import PlacedRecords
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, ModalityTokenizer, Tokenizer
from cleangpt.errors import UserError

IMAGES = "images"
"""The records of a dataset that are images: uint8, (height, width, channels)."""
IMAGE_TOKEN = "<image>"
"""The special token that images stand at, as LLaVA and others call it."""
IMAGE_CHARACTER = "\ufffc"
"""The same for a tokenizer of characters: Unicode's object replacement character."""


def image_token(tokenizer: Tokenizer) -> int:
    """The id of the token that images stand at; among bytes it is 0, which no text has.

    Raises:
        UserError: the tokenizer has none.
    """
    if isinstance(tokenizer, ModalityTokenizer):
        return image_token(tokenizer.text)
    if isinstance(tokenizer, ByteTokenizer):
        return 0
    if isinstance(tokenizer, BPETokenizer) and IMAGE_TOKEN in tokenizer.special:
        return tokenizer.special[IMAGE_TOKEN]
    if isinstance(tokenizer, CharTokenizer) and IMAGE_CHARACTER in tokenizer.characters:
        return tokenizer.characters.index(IMAGE_CHARACTER)
    raise UserError(f"the tokenizer has no token for images; allowed: one with the special token {IMAGE_TOKEN}")


def written_image_token(tokenizer: Tokenizer) -> int:
    """The same where texts say by `IMAGE_TOKEN` where images stand, as they cannot in bytes.

    Raises:
        UserError: the tokenizer has none.
    """
    if isinstance(tokenizer, ByteTokenizer):
        raise UserError(f"bytes have no token for images; allowed: a tokenizer with the special token {IMAGE_TOKEN}")
    return image_token(tokenizer)


def reads_parts(template: ChatTemplate) -> bool:
    """Whether a chat template reads contents in parts, and writes the token of each image itself."""
    return re.search(r"""['"]image['"]""", template.source) is not None


def image_in_rows(
    images: NDArray[np.uint8], ends: int | NDArray[np.int64], row_length: int
) -> dict[str, PlacedRecords]:
    """The records of rows that each have an image.

    Args:
        images: one per row `(rows, height, width, channels)`.
        ends: tokens of a row up to and including its image, the same in all, or `(rows,)`.
        row_length: tokens in a row.
    """
    return {IMAGES: PlacedRecords(images, np.arange(len(images), dtype=np.int64) * row_length + ends)}


def shifted(image: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """An image `(height, width, ...)` moved by some pixels; what it leaves is 0."""
    moved = np.zeros_like(image)
    height, width = image.shape[:2]
    moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return moved


def expanded(ids: NDArray[np.int64], image: int, tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids with every image token repeated, and where each image ends in them.

    Args:
        ids: `(length,)`.
        image: the image token.
        tokens: that an image stands at.
    """
    repeats = np.where(ids == image, tokens, 1)
    return ids.repeat(repeats), np.cumsum(repeats)[ids == image]
