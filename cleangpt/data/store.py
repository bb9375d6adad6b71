"""The token store: a folder of flat, memory-mapped token files and one JSON file that describes them.

    store.json             format, corpus, dtype, vocabulary, and for every split its shards, counts and checksums
    tokenizer.json         what turns the tokens into text again
    chat_template.json     of conversations: how they were written as text
    card.md                the same facts for a reader
    train_00000.bin        token ids, little-endian uint16 (vocabulary up to 65,536) or uint32, document after document
    train_00000.mask       where there is a loss mask: one uint8 per token, 1 where the token is a target that counts
    train_documents.bin    where every document starts, uint64, counted in tokens from the start of the split

The shards of a split are read as one long row of tokens. Opening reads the JSON file and the sizes of the others;
tokens are read when they are used. A store whose documents all have one length (`row_length`) is read a document at a
time, any other in windows that ignore where documents end.
"""

import contextlib
import json
import math
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.chat import CHAT_TEMPLATE, ChatTemplate, find_template
from cleangpt.data.tokenizers import Tokenizer, load_tokenizer
from cleangpt.errors import UserError, blaming
from cleangpt.files import PARTIAL, plain_name, read_json, seal, sha256, write_json, write_text

FORMAT = 1
STORE, TOKENIZER, CARD, JOURNAL = "store.json", "tokenizer.json", "card.md", "journal.json"
SPLITS = ("train", "val", "test")
SHARD_TOKENS = 2**28
COUNTS = ("tokens", "documents", "text_bytes")


@dataclass
class SplitFacts:
    """Counts of one split; `length_histogram[k]` counts the documents of 2**k to 2**(k+1) - 1 tokens.

    `unfinished` is the part of `tokens` whose document has not ended yet; `counts` is what a corpus counts besides.
    """

    tokens: int = 0
    unfinished: int = 0
    documents: int = 0
    text_bytes: int = 0
    longest_document: int = 0
    length_histogram: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, tokens: int, lengths: NDArray[np.int64], text_bytes: int, counts: Mapping[str, int]) -> None:
        """Counts `tokens` of `text_bytes` bytes of UTF-8 text, and the whole `lengths` of the documents that ended."""
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


class Split:
    """One split of a token store, opened; one that is read `shuffled` costs the least so."""

    def __init__(
        self, folder: Path, facts: dict[str, Any], dtype: np.dtype[Any], row_length: int | None, vocab_size: int,
        shuffled: bool = False,
    ) -> None:  # fmt: skip
        self.tokens, self.documents, self.text_bytes = (_count(facts, name) for name in COUNTS)
        self.row_length, self.vocab_size = row_length, vocab_size
        self.masked: bool = facts["masked"]
        self._folder = folder
        self._document_file = _within(folder, facts["document_file"]) if facts["document_file"] else None
        self._starts, self._shards, self._masks = [0], [], []
        self._files = [_within(folder, shard["file"]) for shard in facts["shards"]]
        for file, shard in zip(self._files, facts["shards"], strict=True):
            self._shards.append(_map(file, dtype, shard["tokens"], shuffled))
            if self.masked:
                mask_file = _within(folder, shard["mask_file"])
                self._masks.append(_map(mask_file, np.dtype(np.uint8), shard["tokens"], shuffled))
            self._starts.append(self._starts[-1] + shard["tokens"])
        if self._starts[-1] != self.tokens:
            raise UserError(f"{folder / STORE}: shards hold {self._starts[-1]:,} tokens, not {self.tokens:,}")
        if row_length is not None and row_length * self.documents != self.tokens:
            raise UserError(f"{folder / STORE}: {self.documents} rows of {row_length} are not {self.tokens:,} tokens")

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Tokens `start` to `start + length`, across shards; a view of the file where one shard holds them all."""
        return self._read(self._shards, start, length)

    def read_mask(self, start: int, length: int) -> NDArray[Any]:
        """The loss mask of the same tokens; only for a split that is `masked`."""
        return self._read(self._masks, start, length)

    def place(self, token: int) -> str:
        """Where a token of the split lies: its file, and its number there."""
        shard = min(bisect_right(self._starts, token), len(self._files)) - 1
        return f"{self._files[shard]}, token {token - self._starts[shard]:,}"

    def document_starts(self) -> NDArray[np.uint64]:
        """Where each document starts, memory-mapped; computed where all have one length."""
        if self._document_file is None:
            starts: NDArray[np.uint64] = np.arange(self.documents, dtype=np.uint64) * np.uint64(self.row_length or 0)
            return starts
        return _map(self._document_file, np.dtype("<u8"), self.documents)

    def _read(self, arrays: list[NDArray[Any]], start: int, length: int) -> NDArray[Any]:
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.tokens}")
        shard = min(bisect_right(self._starts, start), len(arrays)) - 1
        offset = start - self._starts[shard]
        part = arrays[shard][offset : offset + length]
        if len(part) == length:
            return part
        return np.concatenate([part, self._read(arrays, start + len(part), length - len(part))])


class TokenStore:
    """An opened token store; `splits` has train, val and, for some corpora, test.

    Raises:
        UserError: the folder is no token store, is of a newer format, or a file of it is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / STORE).is_file():
            raise UserError(f"{folder} is not a token store: it has no {STORE}; make one with cleangpt prepare")
        facts = read_json(folder / STORE)
        with blaming(folder / STORE):
            if facts.get("format") != FORMAT:
                raise UserError(f"{folder} has token store format {facts.get('format')}; this version reads {FORMAT}")
            self._open(folder, facts)

    def _open(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.tokenizer: Tokenizer = load_tokenizer(folder / TOKENIZER)
        self.chat_template: ChatTemplate | None = find_template(folder)
        self.vocab_size: int = facts["vocab_size"]
        self.row_length: int | None = facts["row_length"]
        if facts["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {facts['dtype']!r}")
        dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        self.source: dict[str, Any] = dict(facts["source"] or {})
        self.splits = {
            name: Split(folder, split, dtype, self.row_length, self.vocab_size, shuffled=name == "train")
            for name, split in facts["splits"].items()
        }
        if self.vocab_size != self.tokenizer.vocab_size:
            raise UserError(
                f"{folder / STORE}: vocab_size is {self.vocab_size!r}; allowed: the tokenizer's, which is "
                f"{self.tokenizer.vocab_size:,}"
            )

    def fingerprint(self) -> dict[str, Any]:
        """The checksum of every file of tokens, as noted when it was made, and of the tokenizer; sizes and times."""
        sums = self.facts["sha256"] | {TOKENIZER: sha256(self.folder / TOKENIZER)}
        stats = {name: (self.folder / name).stat() for name in self.facts["sha256"]}
        return {
            "sha256": sums,
            "stamps": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }

    def check_same(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Compares with an earlier `fingerprint`; reads only files whose size or time is another than then.

        Returns:
            The fingerprint now.

        Raises:
            UserError: names the first file that differs.
        """
        now = self.fingerprint()
        for name in sorted(now["sha256"].keys() | before["sha256"].keys()):
            if now["sha256"].get(name) != before["sha256"].get(name):
                raise UserError(
                    f"{self.folder / name} is not the one that this run began with; prepare the corpus from what it "
                    "was then, or start another run"
                )
        self.verify([name for name, stamp in now["stamps"].items() if stamp != before["stamps"].get(name)])
        return now

    def verify(self, names: Collection[str] | None = None) -> None:
        """Reads files once (None: every one of tokens) and compares checksums.

        Raises:
            UserError: names the first file that differs.
        """
        for name, digest in self.facts["sha256"].items():
            if (names is None or name in names) and sha256(self.folder / name) != digest:
                raise UserError(f"{self.folder / name} has changed since it was prepared; run cleangpt prepare --again")


class StoreWriter:
    """Writes a token store in bounded memory; nothing stands at `folder` before `finish`.

    Work in progress lies in `folder` + ".partial". `commit` notes how far the source has been read, so that the next
    writer of the same corpus, source and tokenizer finds it in `position` and goes on there.
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
        chat_template: ChatTemplate | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.partial = folder, folder.with_name(folder.name + PARTIAL)
        self.corpus, self.tokenizer, self.source = corpus, tokenizer, source
        self.row_length, self.masked, self.shard_tokens = row_length, masked, shard_tokens
        self.chat_template = chat_template
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
        text_bytes: int = 0,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Adds `tokens` to a split, and the `lengths` of the documents that end among them, in tokens of this call.

        What follows the last end begins a document that goes on in the next call.

        Raises:
            UserError: an id is not one of the tokenizer's.
        """
        facts = self.splits.setdefault(split, SplitFacts())
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self.tokenizer.vocab_size))[0])
            raise UserError(
                f"token {facts.tokens + wrong:,} of the split {split} would be {tokens[wrong]}; allowed: ids below "
                f"{self.tokenizer.vocab_size:,}, the tokenizer's"
            )
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
            written = part.stop
        facts.add(len(tokens), lengths, text_bytes, counts or {})

    def commit(self, position: int) -> None:
        """Makes all that was appended durable, together with `position`, which the caller counts in its own units."""
        self._flush()
        self.position = position
        facts = {name: asdict(split) for name, split in self.splits.items()}
        sizes = self._full | {name: file.tell() for name, file in self._files.items()}
        write_json(self.partial / JOURNAL, self._identity() | {"position": position, "splits": facts, "sizes": sizes})

    def data_files(self) -> list[Path]:
        """The files of tokens, masks and document starts written so far, by name."""
        return sorted(path for path in self.partial.iterdir() if path.suffix in (".bin", ".mask"))

    def finish(self, card: Callable[[dict[str, Any]], str], **facts: Any) -> TokenStore:
        """Writes the description (`facts` are added to it) and the card made of it, and the store appears at `folder`.

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
            "splits": {name: self._describe(name, self.splits[name]) for name in sorted(self.splits, key=_rank)},
            "sha256": {path.name: sha256(path) for path in self.data_files()},
            **facts,
        }
        write_json(self.partial / STORE, description)
        write_text(self.partial / CARD, card(description))
        (self.partial / JOURNAL).unlink(missing_ok=True)
        seal(self.partial, self.folder)
        return TokenStore(self.folder)

    def close(self) -> None:
        """Closes all files; what was committed stays for the next writer."""
        for file in self._files.values():
            # What is left in a buffer was never committed; a full disk, which would fail here again, has been told.
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

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
            "chat_template": self.chat_template and self.chat_template.to_json(),
            "shard_tokens": self.shard_tokens,
        }
        identity: dict[str, Any] = json.loads(json.dumps(facts))
        return identity

    def _restore(self) -> None:
        """Goes back to the last commit of an interrupted writer of the same store, or to nothing."""
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
        """Appends to a file, and closes one that is full, so that few are open however many shards there are."""
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
            shards.append(entry)
        document_file = f"{name}_documents.bin" if self.row_length is None else None
        counts = {key: value for key, value in asdict(facts).items() if key != "unfinished"}
        return counts | {"masked": self.masked, "document_file": document_file, "shards": shards}


def _rank(split: str) -> tuple[int, str]:
    """Sorts train, val, test before any other name."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS), split


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _count(facts: Mapping[str, Any], name: str) -> int:
    """A count from the description of a split; raises ValueError for anything else."""
    count = facts[name]
    if type(count) is not int or count < 0:
        raise ValueError(f"{name} is {count!r}")
    return count


def _within(folder: Path, name: str) -> Path:
    return folder / plain_name(name, folder / STORE)


def _map(path: Path, dtype: np.dtype[Any], length: int, shuffled: bool = False) -> NDArray[Any]:
    """`path` as an array, memory-mapped; checks that its size is that of `length` numbers.

    Of a file that is read `shuffled` the system need not read ahead, which would be thrown away.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run cleangpt prepare --again") from None
    if size != length * dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, not {length * dtype.itemsize:,}; run cleangpt prepare --again")
    if length == 0:
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if shuffled and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, length)
