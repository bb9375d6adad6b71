"""Tiny Shakespeare (Karpathy 2015), a token per character: the first 90 % train, the rest validates (as nanoGPT)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from cleangpt.corpora.base import Corpus
from cleangpt.corpora.download import download
from cleangpt.corpora.reading import Piece, TextFile, read_text
from cleangpt.corpora.text import characters, write_texts
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from cleangpt.errors import UserError
from cleangpt.files import sha256

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True, kw_only=True)
class ShakespeareChar(Corpus):
    """1,115,394 characters of 65 kinds: 1,003,854 to train, 111,540 to validate, each split one document."""

    file: str | None = None
    """Take this text file; none: download input.txt (1.1 MB)."""
    tokenizer: Literal["char", "byte"] = "char"
    """One token per character of the text, or per byte of any, for a mixture with other corpora."""
    tokenizer_file: str | None = None
    """Use this tokenizer.json, or that of a model by hf:NAME_OR_FOLDER, instead."""
    held_out: float = 0.0
    """Share of the text that neither trains nor validates, taken from the end of the training part: the split test, to
    choose hyperparameters by."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        if not 0 <= self.held_out < 0.9:
            raise UserError(f"corpus.held_out is {self.held_out}; allowed: from 0 to below 0.9")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the splits; the text is not loaded whole."""
        path = self._find(folder.parent / "downloads", console)
        whole = TextFile(path, path.stat().st_size, lambda: read_text(path))
        if not whole.bytes:
            raise UserError(f"{path} is empty; give --file another text")
        length = sum(len(piece.text) for piece in whole.pieces())
        ends = {"train": length * 9 // 10 - round(length * self.held_out), "test": length * 9 // 10, "val": length}
        parts = TextFile(path, whole.bytes, lambda: _split(whole.pieces(), ends))
        tokenizer = self._tokenizer(whole)
        return write_texts(self, folder, [parts], tokenizer, console)

    def _tokenizer(self, whole: TextFile) -> Tokenizer:
        """Characters have no end of text here, as in nanoGPT, so that there are 65."""
        if self.tokenizer_file is not None:
            return load_tokenizer(Path(self.tokenizer_file).expanduser())
        return ByteTokenizer() if self.tokenizer == "byte" else CharTokenizer(characters([whole]))

    def _find(self, downloads: Path, console: Console) -> Path:
        if self.file is None:
            otherwise = "fetch it elsewhere and give --file input.txt (in train: --corpus.file)"
            path = downloads / "tinyshakespeare.txt"
            return download(URL, path, size=SIZE, digest=SHA256, otherwise=otherwise, console=console)
        path = Path(self.file).expanduser()
        if not path.is_file():
            raise UserError(f"corpus.file: {path} does not exist")
        if path.stat().st_size != SIZE or sha256(path) != SHA256:
            console.print(
                f"{path} is not the well-known input.txt: results cannot be compared", markup=False, soft_wrap=True
            )
        return path


def _split(pieces: Iterator[Piece], ends: Mapping[str, int]) -> Iterator[Piece]:
    """One document of each split, given the character at which each ends, in the order of the text."""
    place = 0
    for piece in pieces:
        start, place = place, place + len(piece.text)
        before = 0
        for split, end in ends.items():
            text = piece.text[max(before - start, 0) : max(end - start, 0)]
            if text:
                yield Piece(text, min(end, place) == end, piece.read, split)
            before = end
