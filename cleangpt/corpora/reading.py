"""Files of text, read as a stream of pieces in bounded memory.

A plain text file comes in pieces of at most two blocks, split at line ends where possible, so that a tokenizer never
sees half a word; a document of JSON or Parquet comes in one piece, so the longest must fit into memory. A missing text,
null, is no document, nor is an empty one, whatever the format. Errors in a file are reported in one line that names it.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

from cleangpt.corpora.compression import SUFFIXES, as_file, check_uncompressed, decompressed, is_compressed
from cleangpt.corpora.parquet import parquet_rows
from cleangpt.errors import UserError, nearest
from cleangpt.files import user_path

BLOCK = 2**16
"""Bytes of plain text read at once."""
LONGEST = 2**26
"""Maximum length of a document between separators, in characters."""
LONGEST_LINE = 2**28
"""Maximum length of a line or an array of JSON in bytes, since a small compressed file may contain a very long one."""
JSON, LINES, PARQUET = ".json", (".jsonl", ".ndjson"), ".parquet"
FORMS = f"{', '.join((*LINES, JSON))} (also with {', '.join(SUFFIXES)}) and {PARQUET}"
"""Suffixes of files with fields, for messages."""


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
    begins: bool = True
    """Whether the document begins with this text; set by `corpora.text.grouped`."""


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: its size, and how its pieces are read; each call of `pieces` reads from the start."""

    path: Path
    bytes: int
    pieces: Callable[[], Iterator[Piece]]


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files matched by paths, globs (including `**`) and folders, sorted; hidden files only if named explicitly.

    Links are followed, to files and to folders. A file found in several ways is read once, by its shortest path.

    Raises:
        UserError: a pattern matches no file, or what it finds cannot be read or is a link to nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        with naming(Path(pattern)):
            paths = list(_matches(pattern))
            if lost := next((path for path in paths if not path.exists()), None):
                raise UserError(f"corpus.files: {lost} is a link to a file that does not exist")
            if not (files := [path for path in paths if path.is_file()]):
                raise UserError(f"corpus.files: {pattern} names no file")
        found.update(files)
    if not found:
        raise UserError("corpus.files is empty; give at least one file, glob or folder")
    folders = {folder: folder.resolve() for folder in {path.parent for path in found}}
    once = {
        path.resolve() if path.is_symlink() else folders[path.parent] / path.name: path
        for path in sorted(found, key=lambda path: (len(path.parts), path), reverse=True)
    }
    return sorted(once.values())


def read_pieces(path: Path, text_field: str | None = None) -> Iterator[Piece]:
    """The pieces of a file, by its suffix: `read_documents` of JSON or Parquet; any other is plain text.

    Raises:
        UserError: it is plain text, or Parquet, and compressed.
    """
    return read_text(path) if is_plain(path) else read_documents(path, text_field)


def is_plain(path: Path) -> bool:
    """Whether `read_pieces` reads the file as one document of plain text."""
    return _suffix(path) not in (JSON, *LINES, PARQUET)


def read_text(path: Path) -> Iterator[Piece]:
    """A plain text file, which is one document; an empty file has none. A byte-order mark is no part of it."""
    check_uncompressed(path)
    with naming(path), path.open("rb") as file:
        block = file.read(BLOCK)
        at = mark_length(block, path)
        carried, block = b"", block[at:]
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


def read_documents(path: Path, text_field: str | None = None) -> Iterator[Piece]:
    """A file of JSON or Parquet: each `text_field` that is not empty is a document; None: text, which is not chosen."""
    name, setting = text_field or "text", "corpus.text_field" if text_field else ""
    for entry, location, read in read_entries(path, [name]):
        if text := text_in(entry, name, location, setting):
            yield Piece(text, True, read)


def read_entries(path: Path, fields: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[Any, str, int]]:
    """What a file of JSON or Parquet lists, the location of each entry for messages, and the bytes read so far.

    Of Parquet, only the columns that `fields` and `optional` name; those that are optional may be absent.
    """
    if _suffix(path) == PARQUET:
        return parquet_rows(path, fields, optional)
    return json_entries(path) if _suffix(path) == JSON else json_lines(path)


def json_lines(path: Path) -> Iterator[tuple[Any, str, int]]:
    """The value in each line of JSON, plain or compressed, its location for messages, and the bytes read so far."""
    with naming(path), path.open("rb") as raw:
        yield from _json_lines(path, _content(path, raw), raw)


def json_entries(path: Path) -> Iterator[tuple[Any, str, int]]:
    """As `json_lines`, for a file that may have one array instead of lines."""
    with naming(path), path.open("rb") as raw:
        blocks = _content(path, raw)
        start = next((block for block in blocks if block.strip()), b"")
        blocks = itertools.chain([start], blocks)
        if start.lstrip().startswith(b"["):
            for number, entry in enumerate(_json_array(path, blocks), start=1):
                yield entry, f"{path}, entry {number:,}", raw.tell()
            return
        yield from _json_lines(path, blocks, raw, f"; allowed in {JSON}: an array, or a value per line")


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


def _matches(pattern: str) -> Iterator[Path]:
    """What one path, glob or folder leads to, folders and links to nothing included."""
    path = user_path(pattern)
    if path.is_dir():
        yield from _expand(Path(escape(str(path)), "**"))
    elif path.exists():
        yield path
    elif has_magic(pattern):
        yield from _expand(path)
    else:
        raise UserError(f"corpus.files: {pattern} does not exist")


def _expand(pattern: Path) -> Iterator[Path]:
    """The matches of a glob; unlike in `glob.glob`, links that lead back in a circle are followed once."""
    if "**" not in pattern.parts:
        yield from map(Path, glob(str(pattern)))  # noqa: PTH207 - Path.glob refuses absolute patterns
        return
    at = pattern.parts.index("**")
    for start in _expand(Path(*pattern.parts[:at])):
        for folder in _folders(start):
            yield from _expand(Path(escape(str(folder)), *(pattern.parts[at + 1 :] or ["*"])))


def _folders(start: Path) -> Iterator[Path]:
    """A folder and those below it that are not hidden, each once."""
    waiting, visited = [start], set()
    while waiting:
        folder = waiting.pop(0)
        if folder.is_dir() and (real := folder.resolve()) not in visited:
            visited.add(real)
            waiting += sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
            yield folder


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Reports an error of the system in one line that names the file that is being read, not the one being written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


def mark_length(start: bytes, path: Path) -> int:
    """Length in bytes of the byte-order mark that a file in UTF-8 may have at its start.

    Raises:
        UserError: the mark is that of another encoding.
    """
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{path} is in UTF-16 or UTF-32, by its byte-order mark; convert it to UTF-8")
    return len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0


def _suffix(path: Path) -> str:
    """The suffix of a file in lower case, without that of its compression."""
    return Path(path.stem if is_compressed(path) else path.name).suffix.lower()


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


def _content(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file in blocks, decompressed if necessary, without a byte-order mark."""
    blocks = decompressed(path, raw) if is_compressed(path) else iter(partial(raw.read, BLOCK), b"")
    start = b""
    for block in blocks:
        start += block
        if len(start) >= len(codecs.BOM_UTF32_BE):
            break
    yield start[mark_length(start, path) :]
    yield from blocks


def _json_lines(path: Path, blocks: Iterator[bytes], raw: BinaryIO, hint: str = "") -> Iterator[tuple[Any, str, int]]:
    file = as_file(blocks)
    for number in itertools.count(1):
        location = f"{path}, line {number:,}"
        if not (line := file.readline(LONGEST_LINE + 1)):
            return
        if len(line) > LONGEST_LINE:
            raise UserError(f"{location} has more than {LONGEST_LINE:,} bytes; shorten it")
        if line.strip():
            yield _parsed(line, location, hint), location, raw.tell()


def _json_array(path: Path, blocks: Iterator[bytes]) -> list[Any]:
    content = as_file(blocks).read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        raise UserError(f"{path} is an array of more than {LONGEST_LINE:,} bytes; convert it to JSON lines")
    entries: list[Any] = _parsed(content, str(path))
    return entries


def _parsed(data: bytes, location: str, hint: str = "") -> Any:
    """The value in JSON; the message about an error ends with the hint."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: not valid UTF-8 at byte {error.start:,}; convert it to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON: {error}{hint}") from None


def text_in(entry: Any, name: str, location: str, setting: str) -> str:
    """The text in a field of an entry; empty where it is null.

    Raises:
        UserError: the entry has no such field, or the field has something else; `setting`, if any, chooses the field.
    """
    if not isinstance(entry, dict) or name not in entry:
        hint = nearest(name, entry) if isinstance(entry, dict) else ""
        raise UserError(f"{location}: no field {name!r}{setting and f'; set {setting}'}{hint}")
    return "" if entry[name] is None else checked(entry[name], location, setting)


def checked(text: object, location: str, setting: str) -> str:
    """Checks that a value is text that could also be in a plain text file; `setting`, if any, chooses its field."""
    if not isinstance(text, str):
        raise UserError(f"{location}: {type(text).__name__} where text should be{setting and f'; set {setting}'}")
    if "\0" in text:
        raise UserError(f"{location}: a zero character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{location}: an unpaired surrogate, which is not a character; remove it") from None
    return text
