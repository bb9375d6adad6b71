"""TinyStories (Eldan and Li 2023, "How small can language models be and still speak coherent English?")."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from cleangpt.corpora.base import Corpus, check_text
from cleangpt.corpora.hub_text import Dataset, Shards, ask_hub, check_budget, write_shards
from cleangpt.corpora.reading import (
    Piece,
    TextFile,
    find_files,
    is_plain,
    read_pieces,
    read_separated,
    split_documents,
)
from cleangpt.corpora.text import choose_tokenizer, write_texts
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import END_OF_TEXT
from cleangpt.errors import require

REPOSITORY = "roneneldan/TinyStories"
EDITIONS = {
    "v1": ("TinyStories-train.txt", "TinyStories-valid.txt"),
    "v2": ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
}


@dataclass(frozen=True, kw_only=True)
class TinyStories(Corpus):
    """Short stories in the words of a small child; each is a document. Needs cleangpt[bpe], and [hub] to download."""

    files: tuple[str, ...] = ()
    """Local files, globs or folders: .txt with <|endoftext|> between stories, .jsonl or .parquet; none: download.

    Files with "valid" in their name validate; where there is none, val_fraction of the stories do.
    """
    edition: Literal["v1", "v2", "parquet"] = "v2"
    """What to download: v1 (1.9 GB) or v2, written by GPT-4 alone (2.2 GB), whole; or parquet, v1 shard by shard, each
    removed once it is tokenised (1.0 GB; needs cleangpt[parquet] as well)."""
    max_tokens: int | None = None
    """Stop with the group of stories, about two million characters, that brings the training tokens to so many; none:
    take all."""
    vocab_size: int = 4096
    """Tokens of the byte-pair encoding learned here, at most."""
    tokenizer_file: str | None = None
    """Use this tokenizer.json instead."""
    val_fraction: float = 0.01
    """Share of the stories to validate with, where no file is for that."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        check_text(self.vocab_size, self.val_fraction)
        check_budget(self.max_tokens)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        if not self.files and self.edition == "parquet":
            shards = Shards(Dataset(REPOSITORY, "data"), folder, keep=False)
            return write_shards(self, folder, shards, partial(self._pieces, marked=True), console, self.max_tokens)
        paths = find_files(self.files) if self.files else self._download()
        paths = sorted(paths, key=lambda path: "valid" not in path.name)
        marked = any("valid" in path.name for path in paths)
        files = [
            TextFile(path, path.stat().st_size, partial(self._pieces, path, str(number), marked))
            for number, path in enumerate(paths)
        ]
        tokenizer = choose_tokenizer("bpe", self.vocab_size, self.tokenizer_file, files, console)
        return write_texts(self, folder, files, tokenizer, console, max_tokens=self.max_tokens)

    def _pieces(self, path: Path, name: str, marked: bool) -> Iterator[Piece]:
        pieces = read_separated(path, END_OF_TEXT) if is_plain(path) else read_pieces(path)
        if marked:
            split = "val" if "valid" in path.name else "train"
            return (replace(piece, split=split) for piece in pieces)
        return split_documents(pieces, name, self.val_fraction)

    def _download(self) -> list[Path]:
        hub = require("huggingface_hub", "hub")
        names = EDITIONS[self.edition]
        otherwise = f"fetch {' and '.join(names)} elsewhere and give --files {' '.join(names)}"
        return ask_hub(
            REPOSITORY,
            otherwise,
            lambda: [Path(hub.hf_hub_download(REPOSITORY, name, repo_type="dataset")) for name in names],
        )
