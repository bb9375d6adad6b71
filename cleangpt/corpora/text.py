"""Any text of your own: plain files, JSON or Parquet, by path, glob or folder."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, changed_files, changed_tokenizer, stamp, write_dataset
from cleangpt.corpora.packing import packed
from cleangpt.corpora.reading import Piece, TextFile, find_files, is_plain, read_pieces, split_documents, split_tail
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from cleangpt.data.writer import Chunk, Groups
from cleangpt.errors import UserError
from cleangpt.validation import File

GROUP = 2**21
"""Characters encoded together."""


SAMPLE = 2**25
"""Maximum number of characters to train a byte-pair encoding on."""


END_CHARACTER = "\0"
"""The end-of-text character of a character tokenizer; no text contains it, since files with zero bytes are refused."""


@dataclass(frozen=True, kw_only=True)
class TextCorpus(Corpus):
    """Base class of corpora of text: a tokenizer, which may be trained on the text, and a share for validation."""

    tokenizer: Literal["char", "byte", "bpe"] = "byte"
    """char or byte: one token per character or byte; bpe: byte-pair encoding trained on the text, needs
    the package tokenizers."""
    vocab_size: int = 8192
    """Maximum vocabulary size of the byte-pair encoding."""
    tokenizer_file: File | None = None
    """Use this tokenizer.json instead, or a model's tokenizer as hf:NAME_OR_FOLDER."""
    val_fraction: float = 0.05
    """Share of the text for validation."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        if self.vocab_size < 257:
            raise UserError(f"corpus.vocab_size is {self.vocab_size}; allowed: 257 or more")
        if not 0.0001 <= self.val_fraction <= 0.5:
            raise UserError(f"corpus.val_fraction is {self.val_fraction}; allowed: 0.0001 to 0.5")

    def remedy(self, split: str) -> str:
        """More text, or another share for validation."""
        return f"give more documents or change corpus.val_fraction, which is {self.val_fraction}"

    def choose_tokenizer(self, files: list[TextFile], console: Console) -> Tokenizer:
        """The tokenizer of `tokenizer_file`, or one of the kind `tokenizer`, trained on the files if necessary.

        Raises:
            UserError: there is no text to train on, or a file is not text.
        """
        if not any(file.bytes for file in files):
            raise UserError(f"no text in {files[0].path if files else 'corpus.files'}; it is empty")
        if self.tokenizer_file is not None:
            return load_tokenizer(self.tokenizer_file)
        if self.tokenizer == "byte":
            return ByteTokenizer()
        console.print(f"learning the {self.tokenizer} tokenizer from the text", markup=False)
        if self.tokenizer == "bpe":
            return train_bpe(_sample(files), self.vocab_size)
        return CharTokenizer(characters(files) + END_CHARACTER, END_CHARACTER)

    def changed_inputs(self, dataset: TokenDataset) -> Iterator[str]:
        """What has changed since the dataset was made: files, also new and removed ones, and the tokenizer."""
        yield from changed_files(dataset, vars(self).get("files", ()))
        yield from changed_tokenizer(dataset, self.tokenizer_file)

    def write(self, folder: Path, files: list[TextFile], console: Console, **options: Any) -> TokenDataset:
        """`write_texts` with the tokenizer from `choose_tokenizer`."""
        return write_texts(self, folder, files, self.choose_tokenizer(files, console), console, **options)


def text_files(paths: Sequence[Path], pieces: Callable[[Path, str], Iterator[Piece]]) -> list[TextFile]:
    """Local files; `pieces(path, name)` reads one of them, and its `name` is its number."""
    return [
        TextFile(path, path.stat().st_size, partial(pieces, path, str(number))) for number, path in enumerate(paths)
    ]


def write_texts(
    corpus: Corpus,
    folder: Path,
    files: list[TextFile],
    tokenizer: Tokenizer,
    console: Console,
    row_length: int | None = None,
    max_tokens: int | None = None,
    **source: Any,
) -> TokenDataset:
    """`write_dataset` for files of text; with a row length, their documents are packed into rows."""

    def groups(start: int) -> Groups:
        encoded = encode_files(files, tokenizer, start)
        return encoded if row_length is None else packed(encoded, row_length)

    return write_dataset(
        corpus,
        folder,
        tokenizer,
        groups,
        sum(file.bytes for file in files),
        console,
        source={**source, "files": stamps(files)},
        row_length=row_length,
        max_tokens=max_tokens,
    )


def stamps(files: list[TextFile]) -> list[list[Any]]:
    """Path, size and modification time of each file, for `changed_files`."""
    return [[str(file.path), *stamp(file.path)] for file in files]


def encode_files(files: list[TextFile], tokenizer: Tokenizer, start: int) -> Groups:
    """The encoded groups of all files after the first `start` groups, which are read but not encoded."""
    for read, pieces in itertools.islice(grouped(files), start, None):
        yield read, encode_group(pieces, tokenizer)


def encode_group(pieces: list[Piece], tokenizer: Tokenizer) -> list[Chunk]:
    """Encodes pieces into chunks.

    Each document begins with the tokenizer's prefix, and ends with the end-of-text token, if there is one.
    """
    arrays = _encode(tokenizer, [piece.text for piece in pieces])
    continuing = len(tokenizer.prefix)
    arrays = [array if piece.begins else array[continuing:] for piece, array in zip(pieces, arrays, strict=True)]
    return _chunks(pieces, arrays, tokenizer.eos_id)


def characters(files: list[TextFile]) -> str:
    """Every character that occurs in the files, once, sorted."""
    found: set[str] = set()
    for file in files:
        for piece in file.pieces():
            found.update(piece.text)
    return "".join(sorted(found))


def grouped(files: list[TextFile]) -> Iterator[tuple[int, list[Piece]]]:
    """Pieces in groups of about `GROUP` characters, with the bytes read so far."""
    before, size = 0, 0
    group: list[Piece] = []
    for file in files:
        begins = True
        for piece in file.pieces():
            group.append(piece if begins else replace(piece, begins=False))
            begins = piece.ends
            size += len(piece.text)
            if size >= GROUP:
                yield before + piece.read, group
                group, size = [], 0
        before += file.bytes
    if group:
        yield before, group


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int64]]:
    return tokenizer.encode_all(texts) if isinstance(tokenizer, BPETokenizer) else list(map(tokenizer.encode, texts))


def _chunks(pieces: list[Piece], arrays: list[NDArray[np.int64]], eos_id: int | None) -> list[Chunk]:
    """One chunk per split that the pieces belong to."""
    end = np.array([] if eos_id is None else [eos_id], np.int64)
    chunks = []
    for split in sorted({piece.split for piece in pieces}):
        mine = [(piece, array) for piece, array in zip(pieces, arrays, strict=True) if piece.split == split]
        parts = [np.concatenate([array, end]) if piece.ends else array for piece, array in mine]
        ends = np.cumsum([len(part) for part in parts])[[piece.ends for piece, _ in mine]]
        text_bytes = sum(len(piece.text.encode("utf-8")) for piece, _ in mine)
        chunks.append(Chunk(split, np.concatenate(parts), np.diff(ends, prepend=0), text_bytes))
    return chunks


def _sample(files: list[TextFile]) -> Iterator[str]:
    """Training text, about `SAMPLE` characters at most: the start of every file, in proportion to its size."""
    total = sum(file.bytes for file in files)
    for file in files:
        left = max(1, SAMPLE * file.bytes // total)
        for piece in file.pieces():
            if piece.split == "train":
                yield piece.text[:left]
                left -= len(piece.text)
            if left <= 0:
                break


FEW = 100
"""Up to this number of plain text files, the end of each is for validation."""


@dataclass(frozen=True, kw_only=True)
class Text(TextCorpus):
    """Your own text: each plain text file, entry of JSON or row of Parquet is a document.

    Up to 100 plain text files are each split in two, the first part for training, the rest for validation. With more
    files, and with JSON and Parquet, a hash of its position assigns each document to a split.
    """

    files: tuple[File, ...]
    """Paths, globs or folders: .jsonl or .json, also with .gz, .bz2, .xz or .zst, and .parquet; files with any other
    suffix are plain text."""
    text_field: str = "text"
    """Field of JSON, or column of Parquet, with the text."""
    pack: int | None = None
    """Pack documents into samples of this many tokens, padding the rest; data.seq_len must be equal to it; None:
    samples are windows that ignore document boundaries."""

    @property
    def row_length(self) -> int | None:
        """Tokens in every row of packed documents; a sample has one less."""
        return None if self.pack is None else self.pack + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        if self.pack is not None and self.pack < 1:
            raise UserError(f"corpus.pack is {self.pack}; allowed: a whole number of 1 or more")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        paths = find_files(self.files)
        few = sum(map(is_plain, paths)) <= FEW
        files = text_files(paths, partial(self._pieces, few=few))
        return self.write(folder, files, console, row_length=self.row_length)

    def _pieces(self, path: Path, name: str, few: bool) -> Iterator[Piece]:
        pieces = read_pieces(path, self.text_field)
        if few and is_plain(path):
            return split_tail(pieces, int(path.stat().st_size * (1 - self.val_fraction)))
        return split_documents(pieces, name, self.val_fraction)
