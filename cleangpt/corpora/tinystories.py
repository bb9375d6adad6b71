"""TinyStories (Eldan and Li 2023, "How small can language models be and still speak coherent English?")."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from cleangpt.corpora.hub_text import HubDataset, Shards, ask_hub, check_budget, write_shards
from cleangpt.corpora.reading import Piece, find_files, is_plain, read_pieces, read_separated, split_documents
from cleangpt.corpora.text import TextCorpus, text_files
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.special_tokens import END_OF_TEXT
from cleangpt.errors import require
from cleangpt.validation import File

REPOSITORY = "roneneldan/TinyStories"
EDITIONS = {
    "v1": ("TinyStories-train.txt", "TinyStories-valid.txt"),
    "v2": ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
}


@dataclass(frozen=True, kw_only=True)
class TinyStories(TextCorpus):
    """TinyStories: short stories in a small child's words, each a document. Needs tokenizers, huggingface_hub."""

    tokenizer: Literal["char", "byte", "bpe"] = "bpe"
    """bpe: byte-pair encoding trained on the stories; char or byte: one token per character or byte."""
    vocab_size: int = 4096
    """Maximum vocabulary size of the byte-pair encoding."""
    val_fraction: float = 0.01
    """Share of the stories for validation, if no validation file is given."""
    files: tuple[File, ...] = ()
    """Local files, globs or folders: .txt with <|endoftext|> between stories, .jsonl or .parquet; empty: download.

    Files with "valid" in their name are for validation; without any, val_fraction of the stories is.
    """
    edition: Literal["v1", "v2", "parquet"] = "v2"
    """Edition to download: v1 (1.9 GB); v2, written by GPT-4 only (2.2 GB); or parquet, v1 in shards, each removed once
    it is tokenized (1.0 GB; needs pyarrow too)."""
    max_tokens: int | None = None
    """Stop at this many training tokens, at the end of a group of about two million characters; None: all stories."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        check_budget(self.max_tokens)

    def remedy(self, split: str) -> str:
        """Where a file has "valid" in its name, val_fraction is not used."""
        if self.files and not any(map(_is_valid, find_files(self.files))):
            return super().remedy(split)
        has = "with" if split == "val" else "without"
        return f'it comes from the files {has} "valid" in their name; give stories there'

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        if not self.files and self.edition == "parquet":
            shards = Shards(HubDataset(REPOSITORY, "data"), folder, keep=False)
            return write_shards(self, folder, shards, partial(self._pieces, marked=True), console, self.max_tokens)
        paths = find_files(self.files) if self.files else self._download()
        paths = sorted(paths, key=lambda path: not _is_valid(path))
        marked = any(map(_is_valid, paths))
        files = text_files(paths, partial(self._pieces, marked=marked))
        return self.write(folder, files, console, max_tokens=self.max_tokens)

    def _pieces(self, path: Path, name: str, marked: bool) -> Iterator[Piece]:
        pieces = read_separated(path, END_OF_TEXT) if is_plain(path) else read_pieces(path)
        if marked:
            split = "val" if _is_valid(path) else "train"
            return (replace(piece, split=split) for piece in pieces)
        return split_documents(pieces, name, self.val_fraction)

    def _download(self) -> list[Path]:
        hub = require("huggingface_hub")
        names = EDITIONS[self.edition]
        files = " ".join(names)
        otherwise = f"fetch {' and '.join(names)} elsewhere and give --files {files} (in train: --corpus.files)"
        return ask_hub(
            REPOSITORY,
            otherwise,
            lambda: [Path(hub.hf_hub_download(REPOSITORY, name, repo_type="dataset")) for name in names],
        )


def _is_valid(path: Path) -> bool:
    """Whether a file is for validation, by its name."""
    return "valid" in path.name
