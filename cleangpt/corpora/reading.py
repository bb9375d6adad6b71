"""Files of text, read as a stream of pieces in bounded memory.

A plain text file comes in pieces of at most two blocks, split at line ends where possible, so that a tokenizer never
sees half a word; a document of JSON or Parquet comes in one piece, so the longest must fit into memory. Errors in a
file are reported in one line with their location.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

from cleangpt.errors import UserError, nearest, require

BLOCK = 2**16
"""Bytes of plain text read at once."""
LONGEST = 2**26
"""Maximum length of a document between separators, in characters."""
LONGEST_LINE = 2**28
"""Maximum length of a line of JSON in bytes, since a small compressed file may contain a very long one."""


@dataclass(frozen=True)
class Piece:
    """A part of a document; the pieces of a document are consecutive."""

    text: str
    ends: bool
    """Whether the document ends with this text."""
    read: int
    """Bytes of the file read so far."""
    split: str = "train"
    answers: tuple[tuple[int, int], ...] = ()
    """For a conversation: the character span of each answer."""
    skip_reason: str = ""
    """Why a conversation is skipped; empty if it is not."""


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: its size, and how its pieces are read; each call of `pieces` reads from the start."""

    path: Path
    bytes: int
    pieces: Callable[[], Iterator[Piece]]


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files matched by paths, globs (including `**`) and folders, sorted; hidden files only if named explicitly.

    Raises:
        UserError: a pattern matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        elif has_magic(pattern):
            # Path.glob refuses absolute patterns.
            files = [file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()]  # noqa: PTH207
        else:
            raise UserError(f"corpus.files: {pattern} does not exist")
        if not files:
            raise UserError(f"corpus.files: {pattern} names no file")
        found.update(files)
    if not found:
        raise UserError("corpus.files is empty; give at least one file, glob or folder")
    return sorted(found)


def read_pieces(path: Path, text_field: str = "text") -> Iterator[Piece]:
    """The pieces of a file by its suffix: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; any other is plain text."""
    if is_plain(path):
        return read_text(path)
    return read_parquet(path, text_field) if path.suffix.lower() == ".parquet" else read_jsonl(path, text_field)


def is_plain(path: Path) -> bool:
    """Whether `read_pieces` reads the file as one document of plain text."""
    return not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"))


def read_text(path: Path) -> Iterator[Piece]:
    """A plain text file, which is one document; an empty file has none."""
    with path.open("rb") as file:
        at, carried, block = 0, b"", file.read(BLOCK)
        while block:
            following = file.read(BLOCK)
            data = carried + block
            end = _cut(data) if following else len(data)
            yield Piece(_decode(data[:end], path, at), not following, at + end)
            at, carried, block = at + end, data[end:], following


def read_separated(path: Path, separator: str) -> Iterator[Piece]:
    """A plain text file of documents with `separator` between them; whitespace around a document is stripped."""
    carried = ""
    for piece in read_text(path):
        *whole, carried = (carried + piece.text).split(separator)
        if piece.ends:
            whole.append(carried)
        for document in filter(None, map(str.strip, whole)):
            yield Piece(document, True, piece.read)
        if len(carried) > LONGEST:
            raise UserError(f"{path}: no {separator} in {LONGEST:,} characters; separate the documents by it")


def read_jsonl(path: Path, text_field: str) -> Iterator[Piece]:
    """A file with one JSON object per line, plain or compressed; each non-empty `text_field` is a document."""
    for entry, location, read in json_lines(path):
        if text := _field(entry, text_field, location):
            yield Piece(text, True, read)


def read_parquet(path: Path, text_field: str) -> Iterator[Piece]:
    """A Parquet file; each `text_field` is a document, empty and missing ones are skipped. Needs cleangpt[parquet]."""
    for entry, location, read in parquet_rows(path, [text_field]):
        if entry[text_field]:
            yield Piece(checked(entry[text_field], location, "corpus.text_field"), True, read)


def json_lines(path: Path) -> Iterator[tuple[Any, str, int]]:
    """The value in each line of JSON, plain or compressed, its location for messages, and the bytes read so far."""
    with path.open("rb") as raw:
        try:
            for number, line in enumerate(_decompressed(path, raw), start=1):
                location = f"{path}, line {number:,}"
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{location} has more than {LONGEST_LINE:,} bytes; shorten it")
                if line.strip():
                    yield _parsed(line, location), location, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is corrupt: {error}") from None


def parquet_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Any], str, int]]:
    """The columns of each row of a Parquet file, its location for messages, and the bytes read so far (estimated).

    Those that are `optional` are read if the file has them.
    """
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    row, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(f"{path} has no column {column!r}{nearest(column, file.schema_arrow.names)}")
            wanted = [*columns, *(column for column in optional if column in file.schema_arrow.names)]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for entry in batch.to_pylist():
                    row += 1
                    yield entry, f"{path}, row {row:,}", size * row // file.metadata.num_rows
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {row:,}: not valid UTF-8: {error.reason}") from None
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
        raise UserError(f"{path} is not an intact Parquet file: {str(error).splitlines()[0]}") from None


def split_tail(pieces: Iterable[Piece], start: int) -> Iterator[Piece]:
    """Splits one document in two: train up to the first line that starts at byte `start` or later, val from there.

    If no line starts there within the piece, the split is between two characters. The last piece of the training part
    may be empty.
    """
    at, split = 0, "train"
    for piece in pieces:
        data = piece.text.encode("utf-8")
        if split == "val" or at + len(data) < start:
            yield replace(piece, split=split)
        else:
            cut = _next_line(data, start - at, piece.ends)
            if at + cut:
                yield replace(piece, text=data[:cut].decode("utf-8"), ends=True)
            split = "val"
            if cut < len(data):
                yield replace(piece, text=data[cut:].decode("utf-8"), split=split)
        at += len(data)


def split_documents(pieces: Iterable[Piece], name: str, val_fraction: float) -> Iterator[Piece]:
    """Assigns each document to val or train by a hash of `name` and the document's number."""
    document = 0
    for piece in pieces:
        share = unit_hash(f"{name}:{document}")
        yield replace(piece, split="val" if share < val_fraction else "train")
        document += piece.ends


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _cut(data: bytes) -> int:
    """Where to split a block: after the last line end, else before the last character."""
    if end := data.rfind(b"\n") + 1:
        return end
    starts = range(len(data) - 1, max(len(data) - 5, 0), -1)
    return next((at for at in starts if data[at] & 0xC0 != 0x80), len(data))


def _next_line(data: bytes, at: int, last: bool) -> int:
    """The start of the first line at or after `at`, else of a nearby character; never the end of the `last` piece."""
    if at in (0, len(data)):
        return at
    line = data.find(b"\n", at - 1) + 1
    if 0 < line < len(data) + (not last):
        return line
    ahead = next((start for start in range(at, len(data)) if data[start] & 0xC0 != 0x80), len(data))
    if ahead == len(data) and last:
        return next(start for start in range(at, -1, -1) if data[start] & 0xC0 != 0x80)
    return ahead


def _decode(data: bytes, path: Path, at: int) -> str:
    """Decodes bytes that start at byte `at` of a file."""
    if (zero := data.find(b"\0")) >= 0:
        raise UserError(f"{path} is a binary file (a zero byte at byte {at + zero:,}); give text in UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8 at byte {at + error.start:,} ({error.reason}); convert it to UTF-8"
        ) from None


def _decompressed(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, decompressed if necessary; overlong lines are truncated to the limit + 1."""
    if path.suffix.lower() == ".gz":
        with gzip.open(raw) as file:
            yield from _lines(file)
    elif path.suffix.lower() == ".zst":
        library = require("zstandard", "zstd")
        try:
            stream = library.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield from _lines(io.BufferedReader(stream, BLOCK))
        except library.ZstdError as error:
            raise UserError(f"{path} is corrupt: {error}") from None
    else:
        yield from _lines(raw)


def _lines(file: Any) -> Iterator[bytes]:
    while line := file.readline(LONGEST_LINE + 1):
        yield line


def _parsed(line: bytes, location: str) -> Any:
    """The value in one line of JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{location}: not valid UTF-8 at byte {error.start:,} of the line; convert it to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON: {error}") from None


def _field(entry: Any, text_field: str, location: str) -> str:
    """The text in a field of a line of JSON."""
    if not isinstance(entry, dict) or not isinstance(entry.get(text_field), str):
        hint = nearest(text_field, entry) if isinstance(entry, dict) else ""
        raise UserError(f"{location}: no text in a field {text_field!r}; set corpus.text_field{hint}")
    return checked(entry[text_field], location, "corpus.text_field")


def checked(text: object, location: str, field: str) -> str:
    """Checks that a value is text that could also be in a plain text file."""
    if not isinstance(text, str):
        raise UserError(f"{location}: {type(text).__name__} where text should be; set {field}")
    if "\0" in text:
        raise UserError(f"{location}: a zero character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{location}: an unpaired surrogate, which is not a character; remove it") from None
    return text
