"""A dataset on disk: a folder of flat, memory-mapped columns and one JSON file that describes them.

    dataset.json           format, corpus, dtypes, vocabulary, and for every split its shards, counts and checksums
    tokenizer.json         turns the tokens back into text
    chat_template.json     for conversations: how they were written as text
    card.md                the same description, for people
    train_00000.bin        token ids, little-endian uint16 (vocabulary up to 65,536) or uint32, document after document
    train_00000.mask       with a loss mask: one uint8 per token, 1 where the token counts as a target
    train_00000.NAME.bin   with extra columns: one number per token, little-endian
    train.NAME.bin         with records, such as images: see records.py
    train_documents.bin    the start of every document, uint64, in tokens from the start of the split

The shards of a split are read as one sequence of tokens. Opening a dataset reads the JSON file and the sizes of the
others; tokens are read when they are used. A dataset whose documents all have the same length (`row_length`) is read
one document at a time, any other in windows that ignore document boundaries.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.chat_template import ChatTemplate, find_template
from cleangpt.data.columns import Column, check_column_names
from cleangpt.data.mapped import map_file, read_count
from cleangpt.data.records import Records, no_records, open_records, records_of
from cleangpt.data.tokenizers import Tokenizer, load_tokenizer
from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json, safe_name, sha256

FORMAT = 2
DATASET, TOKENIZER, CARD, JOURNAL = "dataset.json", "tokenizer.json", "card.md", "journal.json"
DATASET_OF_FORMAT_1 = "store.json"
SPLITS = ("train", "val", "test")


class Split:
    """An opened split of a dataset."""

    def __init__(self, folder: Path, description: dict[str, Any], name: str) -> None:
        """`description` is the content of dataset.json; train is read shuffled, the others in order."""
        facts = description["splits"][name]
        self.tokens, self.documents, self.text_bytes = (
            read_count(facts, key) for key in ("tokens", "documents", "text_bytes")
        )
        self.row_length: int | None = description["row_length"]
        self.vocab_size: int = description["vocab_size"]
        self.masked: bool = facts["masked"]
        self.group = len(description.get("group", ())) or 1
        self.columns: dict[str, Column] = {}
        self._files = [_within(folder, shard["file"]) for shard in facts["shards"]]
        self._starts, self._shards, self._masks = [0], [], []
        self._columns: dict[str, list[NDArray[Any]]] = {}
        dtype, self._shuffled = np.dtype(description["dtype"]).newbyteorder("<"), name == "train"
        for file, shard in zip(self._files, facts["shards"], strict=True):
            tokens = shard["tokens"]
            self._shards.append(map_file(file, dtype, tokens, self._shuffled))
            if self.masked:
                mask = _within(folder, shard["mask_file"])
                self._masks.append(map_file(mask, np.dtype(np.uint8), tokens, self._shuffled))
            self._starts.append(self._starts[-1] + tokens)
        for column, entry in description["columns"].items():
            files = [_within(folder, shard["column_files"][column]) for shard in facts["shards"]]
            self.add_column(column, Column(**entry), files)
        self.records = open_records(folder, description, name)
        if self._starts[-1] != self.tokens:
            raise UserError(f"{folder / DATASET}: shards hold {self._starts[-1]:,} tokens, not {self.tokens:,}")
        rows = self.documents if self.documents % self.group == 0 else 0
        if self.row_length is not None and self.row_length * rows != self.tokens:
            raise UserError(
                f"{folder / DATASET}: {self.documents} rows of {self.row_length}, in groups of {self.group}, are not "
                f"{self.tokens:,} tokens"
            )

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Tokens `start` to `start + length`, across shards; a view of the file where one shard holds them all."""
        return self._read(self._shards, start, length)

    def read_mask(self, start: int, length: int) -> NDArray[Any]:
        """The loss mask of the same tokens; only of a split that is `masked`."""
        return self._read(self._masks, start, length)

    def read_row(self, number: int) -> tuple[list[int], list[int]]:
        """The tokens of a row and their loss mask; only of a split that is `masked` and has a `row_length`."""
        assert self.row_length is not None
        start = number * self.row_length
        return self.read(start, self.row_length).tolist(), self.read_mask(start, self.row_length).tolist()

    def read_column(self, name: str, start: int, length: int) -> NDArray[Any]:
        """The values of one of the `columns` for the same tokens."""
        return self._read(self._columns[name], start, length)

    def add_column(self, name: str, column: Column, files: Sequence[Path] | None = None) -> None:
        """Opens one more column, with one file for each shard; None: it is zeros."""
        sizes = [len(shard) for shard in self._shards]
        paths = [None] * len(sizes) if files is None else files
        found = [map_file(path, column.on_disk, size, self._shuffled) for path, size in zip(paths, sizes, strict=True)]
        self.columns[name], self._columns[name] = column, found

    def location(self, token: int) -> str:
        """The location of a token of the split: its file, and its index there."""
        shard = min(bisect_right(self._starts, token), len(self._files)) - 1
        return f"{self._files[shard]}, token {token - self._starts[shard]:,}"

    def _read(self, arrays: list[NDArray[Any]], start: int, length: int) -> NDArray[Any]:
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.tokens}")
        shard = min(bisect_right(self._starts, start), len(arrays)) - 1
        offset = start - self._starts[shard]
        part = arrays[shard][offset : offset + length]
        if len(part) == length:
            return part
        return np.concatenate([part, self._read(arrays, start + len(part), length - len(part))])


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a dataset, of this format or of an older one."""
    return (folder / DATASET).is_file() or (folder / DATASET_OF_FORMAT_1).is_file()


class TokenDataset:
    """An opened dataset; `splits` has train, val and, for some corpora, test.

    Raises:
        UserError: the folder is not a dataset, has another format, or one of its files is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        if not is_dataset(folder):
            raise UserError(f"{folder} is not a dataset: it has no {DATASET}; make one with cleangpt prepare")
        path = folder / DATASET
        description = read_json(path if path.is_file() else folder / DATASET_OF_FORMAT_1)
        with parsing(path):
            if (number := description.get("format")) != FORMAT:
                raise UserError(
                    f"{folder} has dataset format {number}; this version reads {FORMAT}; run cleangpt prepare --again"
                )
            self._open(folder, description)

    def _open(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description
        self.tokenizer: Tokenizer = load_tokenizer(folder / TOKENIZER)
        self.chat_template: ChatTemplate | None = find_template(folder)
        self.vocab_size: int = description["vocab_size"]
        self.row_length: int | None = description["row_length"]
        if description["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {description['dtype']!r}")
        self.columns = {name: Column(**entry) for name, entry in description["columns"].items()}
        check_column_names(self.columns)
        self.records = records_of(description)
        self.group: tuple[str, ...] = tuple(description.get("group", ()))
        self.source: dict[str, Any] = dict(description["source"] or {})
        self.splits = {name: Split(folder, description, name) for name in description["splits"]}
        if self.vocab_size != self.tokenizer.vocab_size:
            raise UserError(
                f"{folder / DATASET}: vocab_size is {self.vocab_size!r}; allowed: the tokenizer's, which is "
                f"{self.tokenizer.vocab_size:,}"
            )

    def add_records(self, records: Mapping[str, Records]) -> None:
        """Adds kinds of records of which the dataset has none, as other sources of a mixture have them."""
        self.records = dict(records)
        for split in self.splits.values():
            split.records |= {name: no_records(kind) for name, kind in records.items() if name not in split.records}

    def fingerprint(self) -> dict[str, Any]:
        """Checksums of all columns, recorded when they were written, and of the tokenizer; sizes and times."""
        sums = self.description["sha256"] | {TOKENIZER: sha256(self.folder / TOKENIZER)}
        stats = {name: (self.folder / name).stat() for name in self.description["sha256"]}
        return {
            "sha256": sums,
            "stamps": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }

    def check_same(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Compares with an earlier `fingerprint`; reads only files whose size or time has changed since.

        Returns:
            The fingerprint now.

        Raises:
            UserError: names the first file that differs.
        """
        now = self.fingerprint()
        for name in sorted(now["sha256"].keys() | before["sha256"].keys()):
            if now["sha256"].get(name) != before["sha256"].get(name):
                raise UserError(
                    f"{self.folder / name} is not the one that this run started with; prepare the corpus from its "
                    "original files, or start another run"
                )
        self.verify([name for name, stamp in now["stamps"].items() if stamp != before["stamps"].get(name)])
        return now

    def verify(self, names: Collection[str] | None = None) -> None:
        """Reads files (None: all columns) and compares their checksums.

        Raises:
            UserError: names the first file that differs.
        """
        for name, digest in self.description["sha256"].items():
            if (names is None or name in names) and sha256(self.folder / name) != digest:
                raise UserError(f"{self.folder / name} has changed since it was prepared; run cleangpt prepare --again")


def _within(folder: Path, name: str) -> Path:
    return folder / safe_name(name, folder / DATASET)
