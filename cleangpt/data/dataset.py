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

import mmap
from bisect import bisect_right
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.chat_template import ChatTemplate, find_template
from cleangpt.data.tokenizers import Tokenizer, load_tokenizer
from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json, safe_name, sha256

FORMAT = 1


STORE, TOKENIZER, CARD, JOURNAL = "store.json", "tokenizer.json", "card.md", "journal.json"


SPLITS = ("train", "val", "test")


COUNTS = ("tokens", "documents", "text_bytes")


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


class TokenDataset:
    """An opened token store; `splits` has train, val and, for some corpora, test.

    Raises:
        UserError: the folder is no token store, is of a newer format, or a file of it is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / STORE).is_file():
            raise UserError(f"{folder} is not a token store: it has no {STORE}; make one with cleangpt prepare")
        facts = read_json(folder / STORE)
        with parsing(folder / STORE):
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


def _count(facts: Mapping[str, Any], name: str) -> int:
    """A count from the description of a split; raises ValueError for anything else."""
    count = facts[name]
    if type(count) is not int or count < 0:
        raise ValueError(f"{name} is {count!r}")
    return count


def _within(folder: Path, name: str) -> Path:
    return folder / safe_name(name, folder / STORE)


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
