"""Pictures are cut into the tiles, and written as the text, of Transformers' processors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Idefics3ImageProcessorPil, SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from cleangpt.data.images import IMAGE_TOKEN
from cleangpt.data.pictures import PictureForm, Resample
from cleangpt.data.tiles import AROUND, WHOLE, Tiles, read_tiles
from cleangpt.data.tokenizers import CharTokenizer, train_bpe
from cleangpt.errors import UserError
from cleangpt.interchange.towers import RESAMPLES

SHAPES = {
    "wide": (30, 90), "tall": (97, 31), "square": (40, 40), "small": (5, 7), "large": (211, 160), "line": (1, 300),
    "column": (300, 2), "as long": (33, 64), "one tile": (16, 16),
}  # fmt: skip
"""Heights and widths."""


def picture(height: int, width: int, folder: Path) -> Path:
    array = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(array).save(folder / "a.png")
    return folder / "a.png"


@pytest.mark.default(36)
@pytest.mark.parametrize(
    "processor, longest, side, resample",
    [
        (Idefics3ImageProcessorPil, 64, 16, "lanczos"),
        (SmolVLMImageProcessorPil, 56, 16, "bicubic"),
        (Idefics3ImageProcessorPil, 48, 32, "bilinear"),
        (SmolVLMImageProcessorPil, 13, 16, "lanczos"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cut", [True, False])
def test_a_picture_has_the_tiles_of_transformers_processors(
    shape: str, cut: bool, processor: type, longest: int, side: int, resample: Resample, tmp_path: Path
) -> None:
    """With a longest edge of whole tiles, of parts of one, and of less than one."""
    file = picture(*SHAPES[shape], tmp_path)
    ours = read_tiles(file, PictureForm(side, side, resample=resample), longest, cut)
    theirs = processor(
        do_image_splitting=cut, size={"longest_edge": longest}, max_image_size={"longest_edge": side},
        resample=RESAMPLES[resample],
    )(Image.open(file), return_tensors="pt", return_row_col_info=True)  # fmt: skip
    pixels = torch.from_numpy(ours.images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close((pixels - 0.5) / 0.5, theirs["pixel_values"][0], atol=1e-5, rtol=0)
    (rows,), (columns,) = theirs["rows"][0], theirs["cols"][0]
    assert (ours.rows, ours.columns) == (rows, columns)
    assert ours.text == get_image_prompt_string(rows, columns, 1, AROUND, IMAGE_TOKEN, WHOLE)


def test_a_tile_need_not_be_square_and_pictures_may_be_grey(tmp_path: Path) -> None:
    """Blocks of one colour each stay what they are."""
    blocks = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    Image.fromarray(blocks.repeat(4, 0).repeat(8, 1)).save(tmp_path / "a.png")
    found = read_tiles(tmp_path / "a.png", PictureForm(4, 8, 1), 24, True)
    assert (found.rows, found.columns) == (2, 3)
    assert found.images.shape == (7, 4, 8, 1) and (found.images[:-1] == blocks.reshape(6, 1, 1, 1)).all()


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    tiles = Tiles(np.zeros((1, 4, 4, 3), np.uint8), 0, 0)
    for tokenizer in (CharTokenizer("ab"), train_bpe(["ab"], 257, [IMAGE_TOKEN])):
        with pytest.raises(UserError, match="no special token <fake_token_around_image>, which"):
            tiles.tokens(tokenizer)
