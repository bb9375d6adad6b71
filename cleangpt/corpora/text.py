"""Any text of your own: plain files, JSON lines or Parquet, by path, glob or folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from cleangpt.corpora.preparation import Corpus, check_text, choose_tokenizer, write_texts
from cleangpt.corpora.reading import Piece, TextFile, find_files, is_plain, read_pieces, split_documents, split_tail
from cleangpt.data.store import TokenStore
from cleangpt.errors import UserError

FEW = 100
"""Up to so many plain text files, each gives its tail to the validation split."""


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """A plain text file is one document; a line of JSON or a row of Parquet is one each.

    Up to 100 plain text files are each split in two: the head trains, the tail validates. More of them, and the
    documents of JSON and Parquet, fall into either split whole, by a hash of their place.
    """

    files: tuple[str, ...]
    """Paths, globs or folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; any other suffix is read as plain text."""
    text_field: str = "text"
    """Field of JSON lines, or column of Parquet, that holds the text."""
    tokenizer: Literal["char", "byte", "bpe"] = "byte"
    """One token per character or byte, or byte-pair encoding learned here (needs cleangpt[bpe])."""
    vocab_size: int = 8192
    """Tokens of the byte-pair encoding, at most."""
    tokenizer_file: str | None = None
    """Use this tokenizer.json instead."""
    val_fraction: float = 0.05
    """Share of the text to validate with."""
    pack: int | None = None
    """Pack whole documents into samples of so many tokens, which data.seq_len must then be, and leave what remains
    empty; none: samples are windows that ignore where documents end."""

    @property
    def row_length(self) -> int | None:
        """Tokens in every row of packed documents; a sample has one less."""
        return None if self.pack is None else self.pack + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        check_text(self.vocab_size, self.val_fraction)
        if self.pack is not None and self.pack < 1:
            raise UserError(f"corpus.pack is {self.pack}; allowed: a whole number of 1 or more")

    def prepare(self, folder: Path, console: Console) -> TokenStore:
        """Writes both splits."""
        paths = find_files(self.files)
        few = sum(map(is_plain, paths)) <= FEW
        files = [
            TextFile(path, path.stat().st_size, partial(self._pieces, path, str(number), few))
            for number, path in enumerate(paths)
        ]
        tokenizer = choose_tokenizer(self.tokenizer, self.vocab_size, self.tokenizer_file, files, console)
        return write_texts(self, folder, files, tokenizer, console, row_length=self.row_length)

    def _pieces(self, path: Path, name: str, few: bool) -> Iterator[Piece]:
        pieces = read_pieces(path, self.text_field)
        if few and is_plain(path):
            return split_tail(pieces, int(path.stat().st_size * (1 - self.val_fraction)))
        return split_documents(pieces, name, self.val_fraction)
