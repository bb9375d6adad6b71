"""Tiny Shakespeare (Karpathy 2015), one token per character: 90 % to train on, the rest to validate (as nanoGPT)."""

import hashlib
import http.client
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from cleangpt.corpora.base import Corpus
from cleangpt.corpora.reading import Piece, TextFile, read_text
from cleangpt.corpora.text import characters, write_texts
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from cleangpt.errors import UserError
from cleangpt.files import sha256, user_path, write_bytes
from cleangpt.validation import File

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True, kw_only=True)
class ShakespeareChar(Corpus):
    """Tiny Shakespeare, 1,115,394 characters, 65 distinct: 1,003,854 for training, 111,540 for validation."""

    file: File | None = None
    """A local copy of the text; None: download input.txt (1.1 MB)."""
    tokenizer: Literal["char", "byte"] = "char"
    """char: one token per character of this text; byte: one per byte, as needed for mixtures with other texts."""
    tokenizer_file: File | None = None
    """Use this tokenizer.json instead, or a model's tokenizer as hf:NAME_OR_FOLDER."""
    held_out: float = 0.0
    """Share of the text held out from the end of the training part as the test split, for tuning hyperparameters."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        if not 0 <= self.held_out < 0.9:
            raise UserError(f"corpus.held_out is {self.held_out}; allowed: from 0 to below 0.9")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the splits, streaming the text."""
        path = self._find(folder.parent / "downloads" / "tinyshakespeare.txt", console)
        whole = TextFile(path, path.stat().st_size, lambda: read_text(path))
        if not whole.bytes:
            raise UserError(f"{path} is empty; give another text: --file (in train: --corpus.file)")
        length = sum(len(piece.text) for piece in whole.pieces())
        ends = {"train": length * 9 // 10 - round(length * self.held_out), "test": length * 9 // 10, "val": length}
        parts = TextFile(path, whole.bytes, lambda: _split(whole.pieces(), ends))
        tokenizer = self._tokenizer(whole)
        return write_texts(self, folder, [parts], tokenizer, console)

    def _tokenizer(self, whole: TextFile) -> Tokenizer:
        """The characters have no end-of-text token, as in nanoGPT, so the vocabulary is 65."""
        if self.tokenizer_file is not None:
            return load_tokenizer(self.tokenizer_file)
        return ByteTokenizer() if self.tokenizer == "byte" else CharTokenizer(characters([whole]))

    def _find(self, download: Path, console: Console) -> Path:
        if self.file is None:
            return _download(download)
        path = user_path(self.file)
        if not path.is_file():
            raise UserError(f"corpus.file: {path} does not exist")
        if path.stat().st_size != SIZE or sha256(path) != SHA256:
            console.print(
                f"{path} is not the usual input.txt: results cannot be compared",
                markup=False,
                soft_wrap=True,
            )
        return path


def _download(path: Path) -> Path:
    """Downloads input.txt to `path`, unless it exists.

    Raises:
        UserError: the network fails, or the file is not the expected one.
    """
    if path.is_file() and sha256(path) == SHA256:
        return path
    otherwise = "fetch it elsewhere and give --file input.txt (in train: --corpus.file)"
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            content = answer.read(SIZE + 1)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {URL} ({getattr(error, 'reason', '') or error}): {otherwise}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{URL} is not the expected file (its SHA-256 differs): {otherwise}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return path


def _split(pieces: Iterator[Piece], ends: Mapping[str, int]) -> Iterator[Piece]:
    """One document per split, given the character at which each ends, in the order of the text."""
    position = 0
    for piece in pieces:
        start, position = position, position + len(piece.text)
        before = 0
        for split, end in ends.items():
            text = piece.text[max(before - start, 0) : max(end - start, 0)]
            if text:
                yield Piece(text, min(end, position) == end, piece.read, split)
            before = end
