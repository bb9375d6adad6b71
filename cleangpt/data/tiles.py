"""Pictures cut into tiles, as Idefics3 and SmolVLM read them, and the text that stands for one.

A picture is enlarged or reduced to a longest edge, stretched to whole tiles, and cut; the tiles, row by row, and the
whole picture in the size of one are images of their own, each after special tokens that name it (Laurençon et al. 2024,
"Building and better understanding vision-language models"; sizes are rounded as in Transformers).
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.images import IMAGE_TOKEN
from cleangpt.data.pictures import PictureForm, open_picture, pixels, stretched
from cleangpt.data.tokenizers import BPETokenizer, Tokenizer
from cleangpt.errors import UserError

AROUND, WHOLE, PLACE = "<fake_token_around_image>", "<global-img>", "<row_{}_col_{}>"
"""What stands around images, and before the whole picture and each tile of it."""


class Tiles(NamedTuple):
    """A picture as several images."""

    images: NDArray[np.uint8]
    """`(rows x columns + 1, height, width, channels)`: the tiles, row by row, and the whole picture."""
    rows: int
    """Of tiles; 0: there is only the whole picture."""
    columns: int

    @property
    def text(self) -> str:
        """What is written for the picture, with the token of images once for each of them."""
        lines = [
            "".join(f"{AROUND}{PLACE.format(row, column)}{IMAGE_TOKEN}" for column in range(1, self.columns + 1))
            for row in range(1, self.rows + 1)
        ]
        above = "\n".join([*lines, "\n"]) if lines else ""
        return f"{above}{AROUND}{WHOLE}{IMAGE_TOKEN}{AROUND}"

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of `text`.

        Raises:
            UserError: the tokenizer has no such special tokens.
        """
        if not (isinstance(tokenizer, BPETokenizer) and AROUND in tokenizer.special):
            raise UserError(
                f"the tokenizer has no special token {AROUND}, which pictures stand between if "
                "model.vision.longest_edge is not 0; allowed: one that has it"
            )
        ((ids, _),) = tokenizer.encode_special([self.text])
        return ids.tolist()  # type: ignore[no-any-return]


def read_tiles(path: Path | str, form: PictureForm, longest_edge: int, cut: bool) -> Tiles:
    """A picture in a file as images of a form.

    Args:
        path: of the file.
        form: of each image; its `resize` is not used.
        longest_edge: of the picture before it is cut, in pixels.
        cut: whether it is; a picture within one tile never is.

    Raises:
        UserError: as `open_picture`.
    """
    picture = open_picture(path, form.channels)
    picture = stretched(picture, _limited(picture.size, longest_edge), form)
    columns, rows = _grid(picture.size, form) if cut else (1, 1)
    picture = stretched(picture, (columns * form.width, rows * form.height), form)
    whole = pixels(stretched(picture, (form.width, form.height), form), form.channels)
    if rows * columns == 1:
        return Tiles(whole[None], 0, 0)
    grid = pixels(picture, form.channels).reshape(rows, form.height, columns, form.width, form.channels)
    return Tiles(np.concatenate([grid.swapaxes(1, 2).reshape(-1, *whole.shape), whole[None]]), rows, columns)


def _limited(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A width and a height, of which the longer becomes `longest`, the other an even number, or 1."""
    width, height = size
    ratio = width / height
    if width >= height:
        return longest, _even(longest / ratio)
    return _even(longest * ratio), longest


def _even(length: float) -> int:
    return max(1, int(length) + int(length) % 2)


def _grid(size: tuple[int, int], form: PictureForm) -> tuple[int, int]:
    """Columns and rows of tiles: as many as cover the longer side, and the other at the same scale."""
    width, height = size
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / form.width)
        return columns, math.ceil(int(columns * form.width / ratio) / form.height)
    rows = math.ceil(height / form.height)
    return math.ceil(int(rows * form.height * ratio) / form.width), rows
