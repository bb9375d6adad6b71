"""Writes a dataset in bounded memory; after an interruption, the next writer resumes at the last commit."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.chat_template import CHAT_TEMPLATE, ChatTemplate
from cleangpt.data.columns import Column, check_column_names, describe_columns
from cleangpt.data.dataset import (
    CARD,
    DATASET,
    FORMAT,
    JOURNAL,
    SPLITS,
    TOKENIZER,
    TokenDataset,
)
from cleangpt.data.records import (
    PlacedRecords,
    Records,
    check_placed,
    check_record_names,
    describe_records,
    record_files,
)
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.errors import UserError
from cleangpt.files import PARTIAL, commit_folder, read_json, sha256, write_json, write_text

SHARD_TOKENS = 2**28


@dataclass
class SplitFacts:
    """Counts of one split."""

    tokens: int = 0
    unfinished: int = 0
    """How many of the last tokens belong to a document that has not ended yet."""
    documents: int = 0
    text_bytes: int = 0
    longest_document: int = 0
    length_histogram: dict[int, int] = field(default_factory=dict)
    """Number of documents with 2**k to 2**(k+1) - 1 tokens, by k."""
    counts: dict[str, int] = field(default_factory=dict)
    """The corpus's own counts, for the card."""
    records: dict[str, int] = field(default_factory=dict)
    """Number of records of each kind."""

    def add(self, tokens: int, lengths: NDArray[np.int64], text_bytes: int, counts: Mapping[str, int]) -> None:
        """Adds `tokens` from `text_bytes` bytes of UTF-8, and the full `lengths` of the documents that ended."""
        self.tokens += tokens
        self.unfinished += tokens - int(lengths.sum())
        self.documents += len(lengths)
        self.text_bytes += text_bytes
        self.longest_document = max(self.longest_document, int(lengths.max(initial=0)))
        for power, count in zip(
            *np.unique(np.log2(np.maximum(lengths, 1)).astype(int), return_counts=True), strict=True
        ):
            self.length_histogram[int(power)] = self.length_histogram.get(int(power), 0) + int(count)
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count


class DatasetWriter:
    """Writes a dataset in bounded memory; nothing appears at `folder` before `finish`.

    Work in progress is in `folder` + ".partial". `commit` records how far the source has been read: the next writer of
    the same corpus, source, tokenizer and columns finds it in `position` and continues there.
    """

    def __init__(
        self,
        folder: Path,
        corpus: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        source: Any = None,
        row_length: int | None = None,
        masked: bool = False,
        columns: Mapping[str, Column] | None = None,
        records: Mapping[str, Records] | None = None,
        group: Sequence[str] = (),
        chat_template: ChatTemplate | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.partial = folder, folder.with_name(folder.name + PARTIAL)
        self.corpus, self.tokenizer, self.source = corpus, tokenizer, source
        self.row_length, self.masked, self.shard_tokens = row_length, masked, shard_tokens
        self.columns, self.group, self.chat_template = dict(columns or {}), list(group), chat_template
        self.records = dict(records or {})
        check_column_names(self.columns)
        check_record_names(self.records, self.columns)
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.position = 0
        self.splits: dict[str, SplitFacts] = {}
        self._files: dict[str, BinaryIO] = {}
        self._full: dict[str, int] = {}
        self.partial.mkdir(parents=True, exist_ok=True)
        self._restore()
        write_text(self.partial / TOKENIZER, tokenizer.to_json())
        if chat_template is not None:
            write_text(self.partial / CHAT_TEMPLATE, chat_template.to_json())

    def append(
        self,
        split: str,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        *,
        mask: NDArray[np.uint8] | None = None,
        columns: Mapping[str, NDArray[Any]] | None = None,
        records: Mapping[str, PlacedRecords] | None = None,
        text_bytes: int = 0,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Appends `tokens` to a split; `lengths` has the tokens in this call of each document that ends among them.

        Tokens after the last end belong to a document that continues in the next call. Records end among the tokens of
        this call; of a kind that is not in `records` there are none.

        Raises:
            UserError: an id is not in the tokenizer's vocabulary, or columns or records do not match the tokens.
        """
        facts = self.splits.setdefault(split, SplitFacts())
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self.tokenizer.vocab_size))[0])
            raise UserError(
                f"token {facts.tokens + wrong:,} of the split {split} would be {tokens[wrong]}; allowed: ids below "
                f"{self.tokenizer.vocab_size:,}, the tokenizer's"
            )
        self._check_columns(columns or {}, len(tokens))
        self._append_records(split, facts, records or {}, len(tokens))
        if len(lengths):
            lengths = np.concatenate([[lengths[0] + facts.unfinished], lengths[1:]]).astype(np.int64)
        if self.row_length is None:
            starts = facts.tokens - facts.unfinished + np.cumsum(lengths) - lengths
            self._file(f"{split}_documents.bin").write(np.asarray(starts, dtype="<u8").tobytes())
        written = 0
        while written < len(tokens):
            shard, offset = divmod(facts.tokens + written, self.shard_tokens)
            part = slice(written, min(written + self.shard_tokens - offset, len(tokens)))
            full = offset + part.stop - part.start == self.shard_tokens
            self._write(f"{split}_{shard:05d}.bin", np.asarray(tokens[part], dtype=self.dtype).tobytes(), full)
            if self.masked:
                assert mask is not None
                self._write(f"{split}_{shard:05d}.mask", np.asarray(mask[part], dtype=np.uint8).tobytes(), full)
            for name, column in self.columns.items():
                assert columns is not None
                content = np.asarray(columns[name][part], dtype=column.on_disk).tobytes()
                self._write(f"{split}_{shard:05d}.{name}.bin", content, full)
            written = part.stop
        facts.add(len(tokens), lengths, text_bytes, counts or {})

    def _append_records(self, split: str, facts: SplitFacts, records: Mapping[str, PlacedRecords], tokens: int) -> None:
        if unknown := records.keys() - self.records.keys():
            raise UserError(f"records {min(unknown)} are appended; allowed: those of the dataset")
        for name, placed in records.items():
            check_placed(name, self.records[name], placed, tokens)
        for name, kind in self.records.items():
            values, ends = (self._file(file) for file in record_files(split, name))
            facts.records.setdefault(name, 0)
            if name in records:
                values.write(np.asarray(records[name].values, dtype=kind.on_disk).tobytes())
                ends.write(np.asarray(records[name].ends + facts.tokens, dtype="<i8").tobytes())
                facts.records[name] += len(records[name].ends)

    def commit(self, position: int) -> None:
        """Flushes everything appended to disk, together with `position`, which the caller counts in its own units."""
        self._flush()
        self.position = position
        facts = {name: asdict(split) for name, split in self.splits.items()}
        sizes = self._full | {name: file.tell() for name, file in self._files.items()}
        write_json(self.partial / JOURNAL, self._identity() | {"position": position, "splits": facts, "sizes": sizes})

    def data_files(self) -> list[Path]:
        """The files of tokens, masks, columns and document starts written so far, sorted by name."""
        return sorted(path for path in self.partial.iterdir() if path.suffix in (".bin", ".mask"))

    def finish(self, card: Callable[[dict[str, Any]], str], **facts: Any) -> TokenDataset:
        """Writes the description (with `facts` added) and its card; the dataset appears at `folder`.

        Raises:
            ValueError: a document has not ended.
        """
        self._flush()
        self.close()
        if any(split.unfinished for split in self.splits.values()):
            raise ValueError("a document has not ended")
        description = {
            "format": FORMAT,
            "corpus": self.corpus,
            "source": self.source,
            "dtype": self.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "row_length": self.row_length,
            "columns": describe_columns(self.columns),
            **describe_records(self.records),
            "group": self.group,
            "splits": {name: self._describe(name, self.splits[name]) for name in sorted(self.splits, key=_rank)},
            "sha256": {path.name: sha256(path) for path in self.data_files()},
            **facts,
        }
        write_json(self.partial / DATASET, description)
        write_text(self.partial / CARD, card(description))
        (self.partial / JOURNAL).unlink(missing_ok=True)
        commit_folder(self.partial, self.folder)
        return TokenDataset(self.folder)

    def close(self) -> None:
        """Closes all files; committed work stays for the next writer."""
        for file in self._files.values():
            # Unwritten buffers were never committed; a full disk, which fails here again, has been reported already.
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

    def _check_columns(self, columns: Mapping[str, NDArray[Any]], tokens: int) -> None:
        if columns.keys() != self.columns.keys():
            names = [", ".join(entry) or "none" for entry in (columns, self.columns)]
            raise UserError(f"the columns appended are {names[0]}; allowed: those of the dataset, {names[1]}")
        for name, values in columns.items():
            if values.shape != (tokens,):
                raise UserError(f"the column {name} has values {values.shape}; allowed: one per token, ({tokens},)")
            dtype = self.columns[name].on_disk
            if dtype.kind != "f" and tokens:
                low, high, limits = values.min(), values.max(), np.iinfo(dtype)
                if values.dtype.kind == "f" or not limits.min <= int(low) <= int(high) <= limits.max:
                    raise UserError(
                        f"the column {name} has {values.dtype} from {low} to {high}; allowed: whole numbers from "
                        f"{limits.min} to {limits.max}, which {dtype.name} holds"
                    )

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _identity(self) -> dict[str, Any]:
        facts = {
            "format": FORMAT,
            "corpus": self.corpus,
            "source": self.source,
            "tokenizer": self.tokenizer.to_json(),
            "columns": describe_columns(self.columns),
            **describe_records(self.records),
            "group": self.group,
            "chat_template": self.chat_template and self.chat_template.to_json(),
            "shard_tokens": self.shard_tokens,
        }
        identity: dict[str, Any] = json.loads(json.dumps(facts))
        return identity

    def _restore(self) -> None:
        """Returns to the last commit of an interrupted writer of the same dataset, or to an empty folder."""
        try:
            journal = read_json(self.partial / JOURNAL)
        except UserError:
            journal = {}
        same = {key: journal.get(key) for key in self._identity()} == self._identity()
        if not same or any(_size(self.partial / name) < size for name, size in journal["sizes"].items()):
            journal = {"sizes": {}, "splits": {}, "position": 0}
        for path in self.data_files():
            if path.name not in journal["sizes"]:
                path.unlink()
        for name, size in journal["sizes"].items():
            os.truncate(self.partial / name, size)
        self._full = journal["sizes"]
        self.position = journal["position"]
        for name, facts in journal["splits"].items():
            histogram = {int(power): count for power, count in facts.pop("length_histogram").items()}
            self.splits[name] = SplitFacts(**facts, length_histogram=histogram)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._full.pop(name, None)
            self._files[name] = (self.partial / name).open("ab")
        return self._files[name]

    def _write(self, name: str, content: bytes, full: bool) -> None:
        """Appends to a file, and closes it when it is full, so that few files are open at a time."""
        file = self._file(name)
        file.write(content)
        if full:
            file.flush()
            os.fsync(file.fileno())
            self._full[name] = file.tell()
            self._files.pop(name).close()

    def _describe(self, name: str, facts: SplitFacts) -> dict[str, Any]:
        shards = []
        for index in range(math.ceil(facts.tokens / self.shard_tokens)):
            tokens = min(self.shard_tokens, facts.tokens - index * self.shard_tokens)
            entry: dict[str, Any] = {"file": f"{name}_{index:05d}.bin", "tokens": tokens}
            if self.masked:
                entry["mask_file"] = f"{name}_{index:05d}.mask"
            if self.columns:
                entry["column_files"] = {column: f"{name}_{index:05d}.{column}.bin" for column in self.columns}
            shards.append(entry)
        document_file = f"{name}_documents.bin" if self.row_length is None else None
        counts = {
            key: value for key, value in asdict(facts).items() if key != "unfinished" and (key != "records" or value)
        }
        return counts | {"masked": self.masked, "document_file": document_file, "shards": shards}


def _rank(split: str) -> tuple[int, str]:
    """Sorts train, val, test before any other name."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS), split


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@dataclass(frozen=True)
class Chunk:
    """What is appended to one split at a time; see `DatasetWriter.append`."""

    split: str
    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: int
    mask: NDArray[np.uint8] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    """Whatever else the card is to count."""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """One value per token for each column of the dataset."""
    records: Mapping[str, PlacedRecords] = field(default_factory=dict)
    """Records of the dataset that end among the tokens."""


Groups = Iterator[tuple[int, list[Chunk]]]
"""After each group: how much of the source has been read, in units of the total; and the chunks of the group."""
