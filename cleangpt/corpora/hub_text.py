"""Datasets streamed from the Hugging Face Hub: one Parquet shard is downloaded, tokenized and removed, then the next.

Even a terabyte corpus needs disk space for one shard and its tokens only. A token budget can end it early.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from cleangpt.corpora import text as text_corpus
from cleangpt.corpora.base import full_source, write_dataset
from cleangpt.corpora.reading import Piece, TextFile, find_files, read_documents, read_pieces, split_documents
from cleangpt.corpora.text import TextCorpus, encode_group, grouped, text_files
from cleangpt.data.dataset import JOURNAL, TOKENIZER, TokenDataset
from cleangpt.data.tokenizers import Tokenizer, load_tokenizer
from cleangpt.data.writer import Groups
from cleangpt.errors import UserError, require
from cleangpt.files import PARTIAL, read_json, write_json
from cleangpt.validation import File

T = TypeVar("T")


GROUPS = "groups.json"


@dataclass(frozen=True)
class HubDataset:
    """The location of a dataset's Parquet files on the Hub."""

    repository: str
    folder: str
    revision: str = "main"

    def ask(self, ask: Callable[[], T]) -> T:
        """`ask_hub` about these files."""
        return ask_hub(self.repository, self.otherwise, ask)

    @property
    def otherwise(self) -> str:
        """What to do if the hub cannot be reached."""
        revision = "" if self.revision == "main" else f" (revision {self.revision})"
        return (
            f"fetch the .parquet files of {self.folder}{revision} elsewhere and give --files their folder "
            "(in train: --corpus.files)"
        )


class Shards:
    """The Parquet files of a dataset, each downloaded when it is read; validation files come first.

    Args:
        dataset: their location on the Hub.
        folder: of the dataset to write; shards are downloaded to `downloads` next to it.
        keep: whether to keep them after reading, also for other datasets.

    Raises:
        UserError: the Hub cannot be reached, or has no such files; names those to download elsewhere.
    """

    def __init__(self, dataset: HubDataset, folder: Path, keep: bool) -> None:
        self.dataset, self.keep = dataset, keep
        name = dataset.repository.replace("/", "--") if keep else folder.name + PARTIAL
        self.folder = folder.parent / "downloads" / name
        hub = require("huggingface_hub")
        self.commit: str = dataset.ask(
            lambda: hub.HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha
        )
        entries = dataset.ask(lambda: list(hub.HfApi().list_repo_tree(
            dataset.repository, dataset.folder, recursive=True, revision=self.commit, repo_type="dataset"
        )))  # fmt: skip
        found = {entry.path: entry.size for entry in entries if _is_shard(entry.path)}
        if not found:
            raise UserError(f"{dataset.repository} has no Parquet files in {dataset.folder}; {dataset.otherwise}")
        ordered = sorted(found, key=lambda name: (not _validates(name), name))
        self.sizes: dict[str, int] = {name: found[name] for name in ordered}

    def files(self, pieces: Callable[[Path, str], Iterator[Piece]]) -> list[TextFile]:
        """The shards as files; `pieces(path, name)` reads one that has been fetched."""
        return [
            TextFile(self.folder / name, size, partial(self._pieces, name, pieces)) for name, size in self.sizes.items()
        ]

    def groups(self, files: list[TextFile], tokenizer: Tokenizer, start: int) -> Groups:
        """The groups of all files after the first `start` groups; no group spans two shards.

        The number of groups in a shard is recorded once it has been read, so that a resumed preparation does not
        download finished shards again, except one whose last groups were not committed.
        """
        read = 0
        for name, file in zip(self.sizes, files, strict=True):
            count = self._counts().get(name)
            if count is None or count > start:
                count = 0
                for count, (part, pieces) in enumerate(grouped([file]), start=1):
                    if count > start:
                        yield read + part, encode_group(pieces, tokenizer)
                self._note(name, count)
                if not self.keep:
                    file.path.unlink(missing_ok=True)
            start = max(0, start - count)
            read += file.bytes

    def source(self) -> dict[str, Any]:
        """The dataset's source, for dataset.json."""
        return {**asdict(self.dataset), "commit": self.commit, "shards": list(self.sizes)}

    def _pieces(self, name: str, pieces: Callable[[Path, str], Iterator[Piece]]) -> Iterator[Piece]:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != self.sizes[name]:
            hub = require("huggingface_hub")
            self.dataset.ask(lambda: hub.hf_hub_download(
                self.dataset.repository, name, repo_type="dataset", revision=self.commit, local_dir=self.folder
            ))  # fmt: skip
        yield from pieces(path, name)

    def _counts(self) -> dict[str, int]:
        path = self.folder / GROUPS
        noted = read_json(path) if path.is_file() else {}
        counts: dict[str, int] = noted.get("shards", {}) if noted.get("of") == self._identity() else {}
        return counts

    def _note(self, name: str, count: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / GROUPS, {"of": self._identity(), "shards": self._counts() | {name: count}})

    def _identity(self) -> list[Any]:
        """Everything that the number of groups in a shard depends on."""
        return [self.commit, text_corpus.GROUP]


@dataclass(frozen=True, kw_only=True)
class HubText(TextCorpus):
    """Web pages, each a document. Needs tokenizers, and huggingface_hub and pyarrow to download."""

    files: tuple[File, ...] = ()
    """Local files, globs or folders, of .parquet or .jsonl, also .jsonl.gz and .jsonl.zst; empty: download, shard by
    shard."""
    max_tokens: int | None = 1_000_000_000
    """Stop at this many training tokens, at the end of a group of about two million characters; None: all documents."""
    keep_shards: bool = False
    """Keep downloaded shards in data/downloads, rather than remove each once it is tokenized."""
    tokenizer: Literal["char", "byte", "bpe"] = "bpe"
    """bpe: byte-pair encoding trained on the text (of the first shard if shards are downloaded); char or byte: one
    token per character or byte."""
    vocab_size: int = 32_768
    """Maximum vocabulary size of the byte-pair encoding."""
    val_fraction: float = 0.005
    """Share of the documents for validation."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        check_budget(self.max_tokens)

    def hub_dataset(self) -> HubDataset:
        """The dataset's location on the Hub."""
        raise NotImplementedError

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        if self.files:
            files = text_files(find_files(self.files), self._local)
            return self.write(folder, files, console, max_tokens=self.max_tokens)
        shards = Shards(self.hub_dataset(), folder, self.keep_shards)
        return write_shards(self, folder, shards, self._remote, console, self.max_tokens)

    def changed_inputs(self, dataset: TokenDataset) -> Iterator[str]:
        """What has changed since the dataset was made: also the repository, folder or revision to download."""
        yield from super().changed_inputs(dataset)
        now = {} if self.files else asdict(self.hub_dataset())
        for name, value in now.items():
            if (before := dataset.source.get(name, value)) != value:
                yield f"the {name} on the Hub was {before}, is {value}, so the text has changed"

    def _local(self, path: Path, name: str) -> Iterator[Piece]:
        return split_documents(read_pieces(path), name, self.val_fraction)

    def _remote(self, path: Path, name: str) -> Iterator[Piece]:
        return split_documents(read_documents(path), name, self.val_fraction)


def write_shards(
    corpus: TextCorpus,
    folder: Path,
    shards: Shards,
    pieces: Callable[[Path, str], Iterator[Piece]],
    console: Console,
    max_tokens: int | None,
) -> TokenDataset:
    """`write_dataset` for shards; the tokenizer is trained on the first training shard alone."""
    files = shards.files(pieces)
    first = [file for file in files if not _validates(file.path.name)][:1]
    tokenizer = _begun(folder, full_source(corpus, shards.source())) or corpus.choose_tokenizer(first, console)
    dataset = write_dataset(
        corpus, folder, tokenizer, lambda start: shards.groups(files, tokenizer, start),
        sum(shards.sizes.values()), console, source=shards.source(), max_tokens=max_tokens,
    )  # fmt: skip
    if not shards.keep:
        shutil.rmtree(shards.folder, ignore_errors=True)
    return dataset


def _begun(folder: Path, source: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of an interrupted preparation from the same source, so that it is not trained again."""
    partial = folder.with_name(folder.name + PARTIAL)
    same = (partial / JOURNAL).is_file() and read_json(partial / JOURNAL).get("source") == source
    return load_tokenizer(partial / TOKENIZER) if same else None


def check_budget(max_tokens: int | None) -> None:
    """Raises UserError for a budget below one token."""
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"corpus.max_tokens is {max_tokens}; allowed: a whole number of 1 or more")


def _is_shard(name: str) -> bool:
    """Whether a path on the Hub is a Parquet file, and stays within the local folder."""
    return name.endswith(".parquet") and ".." not in name.split("/") and not name.startswith("/")


def _validates(name: str) -> bool:
    """Whether a shard is for validation, judging by its name."""
    return "valid" in name.rsplit("/", 1)[-1]


def ask_hub(repository: str, otherwise: str, ask: Callable[[], T]) -> T:
    """The answer of the Hub; reports failures in one line, which ends with what to do `otherwise`."""
    try:
        return ask()
    except Exception as error:  # the client lets errors of its HTTP library through
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise UserError(
            f"cannot download {repository} from the Hugging Face hub ({type(error).__name__}): {otherwise}"
        ) from None
