"""Compressed files as a stream of blocks, in which no end of input passes for the end of the data.

Libraries differ on what they do with a file that breaks off, or with bytes after its first frame: some stop there in
silence. Here every frame must be complete, and whatever follows one must be another.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cleangpt.errors import UserError, require

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

INPUT = 2**12
"""Compressed bytes read at once: few, since they may expand many thousandfold."""


def is_compressed(path: Path) -> bool:
    """Whether the suffix of a file is that of a compressed one."""
    return path.suffix.lower() in SUFFIXES


def check_uncompressed(path: Path) -> None:
    """Raises UserError for a compressed file, where only plain ones are read."""
    if is_compressed(path):
        raise UserError(f"{path} is compressed, which is read for JSON alone; decompress it")


def decompressed(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The content of a compressed file, opened as `raw`, in blocks; it may have several frames, one after another.

    Raises:
        UserError: it is corrupt or truncated, or its library is not installed.
    """
    new, rest, frames = _decompressor(path), b"", 0
    frame: Any = None
    while data := rest or raw.read(INPUT):
        rest = b""
        if frame is None and not (data := data.lstrip(b"\0")):
            continue  # zeros may follow a frame
        frame = frame or new()
        try:
            block = frame.decompress(data)
        except Exception as error:  # of as many kinds as there are libraries
            raise UserError(f"{path} is corrupt: {error}; fetch it again") from None
        if frame.eof:
            frame, rest, frames = None, frame.unused_data, frames + 1
        yield block
    if frame is not None or not frames:
        raise UserError(f"{path} is corrupt: it ends before its compressed data does; fetch it again")


def as_file(blocks: Iterator[bytes]) -> BinaryIO:
    """Blocks of bytes as a file to read."""
    return io.BufferedReader(_Blocks(blocks), 2**16)


class _Blocks(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _decompressor(path: Path) -> Callable[[], Any]:
    """Makes an object that decompresses one frame, block by block."""
    suffix = path.suffix.lower()
    zstandard: Any = require("zstandard") if suffix == ".zst" else None
    makers: dict[str, Callable[[], Any]] = {
        ".gz": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    }
    return makers[suffix]
