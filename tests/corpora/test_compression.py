"""Compressed and columnar files: wherever a file breaks off, whatever follows it, it is not read as a shorter one."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cleangpt.corpora.reading import read_pieces
from cleangpt.errors import UserError

TEXTS = ["first", "zweiter é", "第三"]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [piece.text for piece in read_pieces(path)]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_compressed_lines_are_read_whole(suffix: str, name: str, tmp_path: Path) -> None:
    assert texts_of(tmp_path / f"{name}{suffix}", PACKERS[suffix](lines(TEXTS))) == TEXTS
    assert texts_of(tmp_path / f"{name}{suffix.upper()}", PACKERS[suffix](lines(TEXTS))) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_frames_may_follow_one_another_with_zeros_between(suffix: str, tmp_path: Path) -> None:
    one, two = (PACKERS[suffix](lines(part)) for part in (TEXTS[:1], TEXTS[1:]))
    for content in (one + two, one + b"\0" * 5000 + two, one + two + b"\0" * 5000, one + PACKERS[suffix](b"") + two):
        assert texts_of(tmp_path / f"a.jsonl{suffix}", content) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_that_breaks_off_at_any_byte_is_refused(suffix: str, tmp_path: Path) -> None:
    """Between two frames alone, nothing in a file says that there was another."""
    one, two = (PACKERS[suffix](lines(part)) for part in (TEXTS[:1], TEXTS[1:]))
    path = tmp_path / f"a.jsonl{suffix}"
    for end in range(len(one + two)):
        if end == len(one):
            assert texts_of(path, one) == TEXTS[:1]
            continue
        with pytest.raises(UserError, match=r"^.*a\.jsonl\.\w+ is corrupt: .*fetch it again$"):
            texts_of(path, (one + two)[:end])


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("after", [b"x", b"not a frame" * 1000, b"\0" * 10 + b"<html>"])
def test_what_follows_a_frame_and_is_none_is_refused(suffix: str, after: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is corrupt"):
        texts_of(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](lines(TEXTS)) + after)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_byte_never_gives_other_text(suffix: str, tmp_path: Path) -> None:
    whole = PACKERS[suffix](lines(TEXTS))
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        try:
            assert texts_of(tmp_path / f"a.jsonl{suffix}", bytes(damaged)) == TEXTS
        except UserError as error:
            assert str(tmp_path / f"a.jsonl{suffix}") in str(error)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.gz", "a.bz2", "a.parquet.zst", "a.md.xz"])
def test_what_is_not_json_is_not_decompressed(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is compressed, which is read for JSON alone; decompress it"):
        texts_of(tmp_path / name, PACKERS[Path(name).suffix](b"some text"))


def test_a_parquet_file_that_breaks_off_or_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": TEXTS * 4})
    pyarrow.parquet.write_table(table, path, row_group_size=5, write_page_checksum=True)
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        with pytest.raises(UserError, match=r"a\.parquet is not an intact Parquet file"):
            texts_of(path, whole[:end])
    footer = 8 + int.from_bytes(whole[-8:-4], "little")
    for place in range(4, len(whole) - footer, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        try:
            assert texts_of(path, bytes(damaged)) == TEXTS * 4
        except UserError as error:
            assert str(path) in str(error)
