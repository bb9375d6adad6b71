"""Picture files of every kind become arrays of one size, or are refused in one line that names the file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cleangpt.data import pictures
from cleangpt.data.pictures import PictureForm, decode_picture, read_picture
from cleangpt.errors import UserError

RED = (255, 0, 0)


def saved(image: Any, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(content: bytes, channels: int = 3) -> NDArray[np.uint8]:
    return decode_picture(content, "a.png", PictureForm(4, 6, channels))


def halves(mode: str, left: Any, right: Any) -> Any:
    """A picture of 6 x 4 pixels with a left and a right half."""
    image = Image.new(mode, (6, 4), left)
    image.paste(right, (3, 0, 6, 4))
    return image


def test_pixels_come_as_they_are() -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert (decoded(saved(Image.fromarray(array))) == array).all()


def test_a_picture_is_resized_as_pillow_does() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert (decoded(saved(image)) == np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC))).all()


@pytest.mark.parametrize(
    ("image", "options", "left", "right"),
    [
        (halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), {}, RED, (255, 255, 255)),
        (halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 128)), {}, RED, (127, 127, 127)),
        (halves("LA", (0, 255), (0, 0)), {}, (0, 0, 0), (255, 255, 255)),
        (halves("L", 10, 20), {}, (10,) * 3, (20,) * 3),
        (halves("1", 0, 1), {}, (0,) * 3, (255,) * 3),
        (Image.fromarray(np.tile(np.array([10, 20], np.uint16).repeat(3) * 256, (4, 1))), {}, (10,) * 3, (20,) * 3),
        (halves("RGB", RED, (0, 0, 255)).quantize(4), {}, RED, (0, 0, 255)),
        (halves("RGB", RED, (0, 0, 255)).quantize(4), {"transparency": 0}, None, None),
        (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), {"form": "TIFF"}, RED, (0, 0, 0)),
        (halves("HSV", (0, 255, 255), (0, 0, 0)).convert("RGB"), {"form": "BMP"}, RED, (0, 0, 0)),
    ],
    ids=["transparent", "half transparent", "grey transparent", "grey", "bits", "16 bits", "palette",
         "transparent palette", "CMYK", "BMP"],
)  # fmt: skip
def test_every_kind_of_pixel_becomes_rgb(image: Any, options: dict[str, Any], left: Any, right: Any) -> None:
    found = decoded(saved(image, **options))
    assert found.shape == (4, 6, 3) and found.dtype == np.uint8
    colors = {tuple(map(int, found[0, column])) for column in (0, 5)}
    if left is None:
        assert (255, 255, 255) in colors
    else:
        assert np.abs(found[1, 0].astype(int) - left).max() <= 1 and np.abs(found[1, 5].astype(int) - right).max() <= 1


def test_grey_is_one_channel() -> None:
    assert (decoded(saved(halves("L", 10, 20)), channels=1)[0, :, 0] == [10, 10, 10, 20, 20, 20]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(orientation: int) -> None:
    """Against the definition: of which corner the first row and column are."""
    array = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[274] = orientation
    turned = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.T, 6: array.T[:, ::-1],
              7: array.T[::-1, ::-1], 8: array.T[::-1]}[orientation]  # fmt: skip
    found = decode_picture(saved(Image.fromarray(array), exif=exif), "a.png", PictureForm(*turned.shape, 1))
    assert (found[..., 0] == turned).all()


def _frames() -> bytes:
    first, second = halves("L", 0, 255), halves("L", 255, 0)
    return saved(first, "GIF", save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture in a format that Pillow reads"),
        (b"not a picture", "is not a picture in a format that Pillow reads"),
        (saved(Image.effect_noise((64, 64), 90))[:-900], "cannot be decoded: .*truncated"),
        (saved(Image.effect_noise((64, 64), 90), "JPEG")[:-900], "cannot be decoded: .*truncated"),
        (_frames(), "is animated, with 2 frames; allowed: a single one"),
        (saved(Image.new("F", (6, 4)), "TIFF"), "has floating-point pixels; allowed: 8 or 16 bits"),
    ],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "animated", "floats"],
)
def test_what_is_no_picture_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"^a.png {message}"):
        decoded(content)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_picture_is_decoded_or_refused_in_one_line(seed: int) -> None:
    draw = np.random.default_rng(seed)
    form = ("PNG", "JPEG", "GIF", "TIFF", "WEBP")[seed % 5]
    content = bytearray(saved(Image.effect_noise((20, 20), 90), form))
    for place in draw.integers(0, len(content), 4):
        content[place] = draw.integers(256)
    try:
        assert decoded(bytes(content)).shape == (4, 6, 3)
    except UserError as error:
        assert str(error).startswith("a.png ") and "\n" not in str(error)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(Image.new("1", (40, 30)))
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    with pytest.raises(UserError, match=r"^a.png has 40 x 30 pixels; allowed: at most 1,000 in all"):
        decoded(content)


@pytest.mark.parametrize("limit", [2000, 1000])
def test_a_bomb_is_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow itself warns of what has more pixels than its limit, and refuses what has twice as many."""
    content = saved(Image.new("1", (60, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(pictures, "MOST_PIXELS", limit)
    with pytest.raises(UserError, match=f"^a.png has .*pixels; allowed: at most {limit:,}"):
        decoded(content)


@pytest.mark.parametrize(("name", "message"), [("none.png", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_picture(tmp_path / name, PictureForm(4, 6))
