"""Picture files to arrays of one size, by Pillow; what cannot be one picture is refused in one line."""

import io
import math
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cleangpt.errors import UserError, require
from cleangpt.files import user_path

MOST_PIXELS = 2**26
"""Width x height of the largest picture that is decoded: 8,192 x 8,192."""


Resize = Literal["stretch", "crop"]
Resample = Literal["bicubic", "bilinear", "lanczos"]


class PictureForm(NamedTuple):
    """What every picture becomes: an array `(height, width, channels)`, uint8."""

    height: int
    """In pixels."""
    width: int
    channels: int = 3
    """1: grey; 3: red, green and blue."""
    resize: Resize = "stretch"
    """stretch: each side gets its size; crop: the side that is relatively shorter, and the middle is cut out."""
    resample: Resample = "bicubic"
    """Interpolation, by the name that Pillow has for it."""


def read_picture(path: Path | str, form: PictureForm) -> NDArray[np.uint8]:
    """A picture in a file as an array `(height, width, channels)`.

    Raises:
        UserError: the file is missing, or `decode_picture` refuses it.
    """
    return decode_picture(*_content(path), form)


def decode_picture(content: bytes, name: str, form: PictureForm) -> NDArray[np.uint8]:
    """A picture in any format that Pillow reads as an array `(height, width, channels)`.

    Args:
        content: of the file.
        name: for messages.
        form: of the result.

    Raises:
        UserError: as `open_picture`, or it is too narrow for `resize="crop"`.
    """
    return _sized(_decoded(content, name, form.channels), name, form)


def open_picture(path: Path | str, channels: int) -> Any:
    """A picture in a file as an image of Pillow, grey for one channel, else RGB.

    It is turned as its EXIF data say, transparency becomes white, CMYK and palettes become RGB, and 16-bit grey loses
    its lower bits.

    Raises:
        UserError: the file is missing, or no picture, truncated, damaged, animated or too large, or has floating-point
            pixels.
    """
    return _decoded(*_content(path), channels)


def _content(path: Path | str) -> tuple[bytes, str]:
    """The content of a file, and its name for messages."""
    file = user_path(str(path))
    try:
        return file.read_bytes(), str(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _decoded(content: bytes, name: str, channels: int) -> Any:
    library, operations = require("PIL.Image"), require("PIL.ImageOps")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused below, and of damaged EXIF data
            image: Any = library.open(io.BytesIO(content))
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{name} has {image.width:,} x {image.height:,} pixels; allowed: at most {MOST_PIXELS:,} in all"
                )
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise UserError(f"{name} is animated, with {frames:,} frames; allowed: a single one")
            image.load()
            image = operations.exif_transpose(image)
            return _plain(image, name, "L" if channels == 1 else "RGB")
    except library.DecompressionBombError:
        raise UserError(f"{name} has too many pixels; allowed: at most {MOST_PIXELS:,}") from None
    except library.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture in a format that Pillow reads") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file may fail in any of its decoders
        raise UserError(f"{name} cannot be decoded: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _sized(image: Any, name: str, form: PictureForm) -> NDArray[np.uint8]:
    """The picture as an array in its size, with sides and middle rounded as Transformers' processors round them."""
    (width, height), size = image.size, (form.width, form.height)
    if form.resize == "stretch":
        return pixels(stretched(image, size, form), form.channels)
    if form.width * height >= form.height * width:
        size = (form.width, height * form.width // width)
    else:
        size = (width * form.height // height, form.height)
    if math.prod(size) > MOST_PIXELS:
        raise UserError(f"{name} has {width:,} x {height:,} pixels, too narrow for resize 'crop'; allowed: stretch")
    left, top = (size[0] - form.width) // 2, (size[1] - form.height) // 2
    middle = stretched(image, size, form).crop((left, top, left + form.width, top + form.height))
    return pixels(middle, form.channels)


def stretched(image: Any, size: tuple[int, int], form: PictureForm) -> Any:
    """The picture in a size, (width, height), by the form's interpolation."""
    return image.resize(size, getattr(require("PIL.Image"), form.resample.upper()))


def pixels(image: Any, channels: int) -> NDArray[np.uint8]:
    """The pixels `(height, width, channels)` of an image of Pillow."""
    return np.array(image, np.uint8).reshape(image.height, image.width, channels)


def resized(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A picture `(rows, columns, 1 or 3)` as `(height, width, 3)`, by bicubic interpolation; as it is where it fits."""
    if picture.shape != (height, width, 3):
        library = require("PIL.Image")
        image = library.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
        picture = np.array(image.convert("RGB").resize((width, height), library.BICUBIC), np.uint8)
    return picture


def _plain(image: Any, name: str, mode: str) -> Any:
    """The picture in RGB or grey, on white where it is transparent."""
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels; allowed: 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        scaled = values >> 8 if values.max(initial=0) > 255 else values
        image = require("PIL.Image").fromarray(scaled.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = require("PIL.Image").new("RGBA", image.size, "white")
        image = require("PIL.Image").alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)
