"""From a corpus to a token store: encode, write, commit, show progress, end with the card.

Everything streams: what is in memory is one group of pieces of text, `GROUP` characters, whatever the size of the
corpus. Byte-pair encoding, the one costly step, runs on all cores in the threads of `tokenizers`, which need no other
process; characters and bytes are encoded faster than a disk reads. The groups are cut by the text alone, so the result
does not depend on the machine, and a preparation that was interrupted goes on at the last group it committed.
"""

import contextlib
import errno
import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cleangpt.config import CorpusConfig, to_json
from cleangpt.corpora.reading import Piece, TextFile
from cleangpt.data.chat import ChatTemplate
from cleangpt.data.store import STORE, StoreWriter, TokenStore
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from cleangpt.errors import UserError, blaming
from cleangpt.files import PARTIAL

GROUP = 2**21
"""Characters encoded together."""
SAMPLE = 2**25
"""Characters that a byte-pair encoding is learned from, at most."""
COMMIT_SECONDS = 2.0
"""Work that an interruption may cost."""
END_CHARACTER = "\0"
"""Ends a document where tokens are characters; no text holds it, since a zero byte marks a binary file."""


@dataclass(frozen=True, kw_only=True)
class Corpus(CorpusConfig):
    """What every corpus can do."""

    def check(self) -> None:
        """Raises UserError for a field out of range; the types have been checked."""

    def prepare(self, folder: Path, console: Console) -> TokenStore:
        """Makes the token store at `folder`, and tells the console how it goes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chunk:
    """What is appended to one split at once; see `StoreWriter.append`."""

    split: str
    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: int
    mask: NDArray[np.uint8] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the card tells besides."""


def check_text(vocab_size: int, val_fraction: float) -> None:
    """Raises UserError for a vocabulary too small for every byte, or a share to validate with that leaves no text."""
    if vocab_size < 257:
        raise UserError(f"corpus.vocab_size is {vocab_size}; allowed: 257 or more")
    if not 0.0001 <= val_fraction <= 0.5:
        raise UserError(f"corpus.val_fraction is {val_fraction}; allowed: 0.0001 to 0.5")


def as_json(corpus: CorpusConfig) -> dict[str, Any]:
    """A corpus as JSON, with its kind.

    Raises:
        UserError: its class is not registered.
    """
    from cleangpt.corpora import CORPORA  # here, because the registry imports every corpus, and each of them this file

    if type(corpus) not in CORPORA.values():
        name = type(corpus).__name__
        raise UserError(f"corpus is a {name}, which is not registered: CORPORA[{name.lower()!r}] = {name}")
    return to_json(corpus, CORPORA)


Groups = Iterator[tuple[int, list[Chunk]]]
"""How much of the source has been read after a group, in the unit of the total, and the chunks of the group."""


def write_store(
    corpus: Corpus,
    folder: Path,
    tokenizer: Tokenizer,
    groups: Callable[[int], Groups],
    total: int,
    console: Console,
    *,
    source: Any = None,
    row_length: int | None = None,
    chat_template: ChatTemplate | None = None,
    max_tokens: int | None = None,
) -> TokenStore:
    """Writes the chunks of all groups; `groups(n)` gives those after the first n.

    With `max_tokens` it ends after the group with which there are so many tokens to train on.

    Raises:
        UserError: there is nothing to train on or to validate with.
    """
    writer = StoreWriter(
        folder, as_json(corpus), tokenizer, source=source, row_length=row_length, masked=row_length is not None,
        chat_template=chat_template,
    )  # fmt: skip
    try:
        with _progress(console) as bar:
            task = bar.add_task(folder.name, total=total if max_tokens is None else max_tokens, rate="")
            began, tokens, committed = time.monotonic(), 0, time.monotonic()
            following = iter(() if _enough(writer, max_tokens) else groups(writer.position))
            for position, (read, chunks) in enumerate(following, start=writer.position + 1):
                for chunk in chunks:
                    writer.append(
                        chunk.split, chunk.tokens, chunk.lengths, mask=chunk.mask, text_bytes=chunk.text_bytes,
                        counts=chunk.counts,
                    )  # fmt: skip
                    tokens += len(chunk.tokens)
                rate = tokens / max(time.monotonic() - began, 1e-9)
                done = read if max_tokens is None else _training_tokens(writer)
                bar.update(task, completed=done, rate=f"{rate:,.0f} tokens/s")
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    writer.commit(position)
                    committed = time.monotonic()
                if _enough(writer, max_tokens):
                    break
        for split in ("train", "val"):
            if split not in writer.splits or not writer.splits[split].tokens:
                fraction = getattr(corpus, "val_fraction", None)
                raise UserError(f"no text for the split {split}; change corpus.val_fraction, which is {fraction}")
        return writer.finish(lambda facts: card(folder.name, facts, tokenizer))
    finally:
        writer.close()


def _enough(writer: StoreWriter, max_tokens: int | None) -> bool:
    """Whether there are so many tokens to train on, and no document has still to end."""
    unfinished = any(split.unfinished for split in writer.splits.values())
    return max_tokens is not None and _training_tokens(writer) >= max_tokens and not unfinished


def _training_tokens(writer: StoreWriter) -> int:
    return writer.splits["train"].tokens if "train" in writer.splits else 0


def write_texts(
    corpus: Corpus,
    folder: Path,
    files: list[TextFile],
    tokenizer: Tokenizer,
    console: Console,
    row_length: int | None = None,
    max_tokens: int | None = None,
    **source: Any,
) -> TokenStore:
    """`write_store` of files of text; with a row length, of their documents packed into rows."""
    from cleangpt.corpora.packing import packed  # here, because packing imports this file

    def groups(start: int) -> Groups:
        encoded = encode_files(files, tokenizer, start)
        return encoded if row_length is None else packed(encoded, row_length)

    return write_store(
        corpus,
        folder,
        tokenizer,
        groups,
        sum(file.bytes for file in files),
        console,
        source={**source, "files": stamps(files)},
        row_length=row_length,
        max_tokens=max_tokens,
    )


def stamps(files: list[TextFile]) -> list[list[Any]]:
    """Path, size and time of change of each file, by which `changed` sees that one is another."""
    return [[str(file.path), file.bytes, file.path.stat().st_mtime_ns] for file in files]


def encode_files(files: list[TextFile], tokenizer: Tokenizer, start: int) -> Groups:
    """The groups of all files, without the first `start`, which are read but not encoded."""
    for read, pieces in itertools.islice(grouped(files), start, None):
        yield read, encode_group(pieces, tokenizer)


def encode_group(pieces: list[Piece], tokenizer: Tokenizer) -> list[Chunk]:
    """The chunks of some pieces; each document ends with the end-of-text token, where the tokenizer has one."""
    return _chunks(pieces, _encode(tokenizer, [piece.text for piece in pieces]), tokenizer.end_of_text)


def choose_tokenizer(
    kind: str, vocab_size: int, given: str | None, files: list[TextFile], console: Console
) -> Tokenizer:
    """The `given` tokenizer file, or one of a kind (char, byte, bpe), learned from the files where it learns.

    Raises:
        UserError: there is no text to learn from, or a file is not text.
    """
    if not any(file.bytes for file in files):
        raise UserError(f"no text in {files[0].path if files else 'corpus.files'}; it is empty")
    if given is not None:
        return load_tokenizer(Path(given).expanduser())
    if kind == "byte":
        return ByteTokenizer()
    console.print(f"learning the {kind} tokenizer from the text", markup=False)
    if kind == "bpe":
        return train_bpe(_sample(files), vocab_size)
    return CharTokenizer(characters(files) + END_CHARACTER, END_CHARACTER)


def characters(files: list[TextFile]) -> str:
    """Every character that occurs in the files, once, sorted."""
    found: set[str] = set()
    for file in files:
        for piece in file.pieces():
            found.update(piece.text)
    return "".join(sorted(found))


@contextlib.contextmanager
def alone(folder: Path, console: Console) -> Iterator[None]:
    """Waits until no other process makes the same store; the system frees the lock of a process that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"another process prepares {folder}; waiting for it", markup=False, soft_wrap=True)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink()  # still held: one who waits sees that it is gone, and makes another
        lock.release()


@contextlib.contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Tells failures of the system in one line, and leaves nothing half-written after any error.

    An interruption is no error: what was committed stays, to be gone on with.
    """
    try:
        yield
    except (UserError, OSError) as error:
        shutil.rmtree(folder.with_name(folder.name + PARTIAL), ignore_errors=True)
        if isinstance(error, UserError):
            raise
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise UserError(f"the disk is full while preparing {folder}; free some space and prepare again") from None
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def changed(store: TokenStore) -> str:
    """The first file of text that has changed since the store was made of it, or an empty string."""
    with blaming(store.folder / STORE):
        for name, size, modified in store.source.get("files", []):
            path = Path(name)
            if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) != (size, modified):
                return str(path)
    return ""


def card(name: str, facts: dict[str, Any], tokenizer: Tokenizer) -> str:
    """The facts of a token store in Markdown, for a reader."""
    rows = "\n".join(_card_row(split, counts) for split, counts in facts["splits"].items())
    end = "none" if tokenizer.end_of_text is None else str(tokenizer.end_of_text)
    digests = "".join(f"{file} {digest}\n" for file, digest in sorted(facts["sha256"].items()))
    python = f"Python {facts['source']['python']}\n" if "python" in (facts["source"] or {}) else ""
    settings = ", ".join(f"{key}={value!r}" for key, value in facts["corpus"].items() if key != "kind")
    return (
        f"# {name}\n\n{facts['corpus'].get('kind', '')}: {settings}\n{python}\n"
        "| split | documents | tokens | bytes of text | bytes per token | longest document |\n"
        f"|---|---:|---:|---:|---:|---:|\n{rows}\n\n"
        f"vocabulary  {facts['vocab_size']:,} tokens ({type(tokenizer).__name__}), end of text: {end}\n"
        f"stored as   {facts['dtype']}\n"
        f"sha256      {hashlib.sha256(digests.encode()).hexdigest()}\n\n{_counts(facts)}"
        f"Documents by length in tokens\n\n{_histogram(facts)}\n"
    )


def _card_row(split: str, counts: dict[str, Any]) -> str:
    per_token = counts["text_bytes"] / counts["tokens"]
    numbers = (counts["documents"], counts["tokens"], counts["text_bytes"])
    longest = counts["longest_document"]
    return " | ".join([f"| {split}", *(f"{number:,}" for number in numbers), f"{per_token:.3f}", f"{longest:,} |"])


def _counts(facts: dict[str, Any]) -> str:
    """What a corpus has counted besides, over all splits; empty: nothing."""
    total: dict[str, int] = {}
    for split in facts["splits"].values():
        for name, count in split["counts"].items():
            total[name] = total.get(name, 0) + count
    lines = [f"{name}: {count:,}\n" for name, count in total.items()]
    return "\n".join([*lines, ""]) if lines else ""


def _histogram(facts: dict[str, Any], width: int = 40) -> str:
    counts: dict[int, int] = {}
    for split in facts["splits"].values():
        for power, count in split["length_histogram"].items():
            counts[int(power)] = counts.get(int(power), 0) + count
    most = max(counts.values())
    lines = [
        f"    {f'{2**power:,} to {2 ** (power + 1) - 1:,}':>27}  {'█' * round(width * count / most):<{width}} {count:,}"
        for power, count in sorted(counts.items())
    ]
    return "\n".join(line.rstrip() for line in lines)


def grouped(files: list[TextFile]) -> Iterator[tuple[int, list[Piece]]]:
    """Pieces in groups of about `GROUP` characters, with the bytes read so far."""
    before, size = 0, 0
    group: list[Piece] = []
    for file in files:
        for piece in file.pieces():
            group.append(piece)
            size += len(piece.text)
            if size >= GROUP:
                yield before + piece.read, group
                group, size = [], 0
        before += file.bytes
    if group:
        yield before, group


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int64]]:
    return tokenizer.encode_all(texts) if isinstance(tokenizer, BPETokenizer) else list(map(tokenizer.encode, texts))


def _chunks(pieces: list[Piece], arrays: list[NDArray[np.int64]], end_of_text: int | None) -> list[Chunk]:
    """One chunk per split that the pieces belong to."""
    end = np.array([] if end_of_text is None else [end_of_text], np.int64)
    chunks = []
    for split in sorted({piece.split for piece in pieces}):
        mine = [(piece, array) for piece, array in zip(pieces, arrays, strict=True) if piece.split == split]
        parts = [np.concatenate([array, end]) if piece.ends else array for piece, array in mine]
        ends = np.cumsum([len(part) for part in parts])[[piece.ends for piece, _ in mine]]
        text_bytes = sum(len(piece.text.encode("utf-8")) for piece, _ in mine)
        chunks.append(Chunk(split, np.concatenate(parts), np.diff(ends, prepend=0), text_bytes))
    return chunks


def _sample(files: list[TextFile]) -> Iterator[str]:
    """Training text of at most about `SAMPLE` characters: the start of every file, in proportion to its size."""
    total = sum(file.bytes for file in files)
    for file in files:
        left = max(1, SAMPLE * file.bytes // total)
        for piece in file.pieces():
            if piece.split == "train":
                yield piece.text[:left]
                left -= len(piece.text)
            if left <= 0:
                break


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )
