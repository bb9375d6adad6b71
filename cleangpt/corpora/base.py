"""From a corpus to a dataset: encode, write, commit, show progress, and write the card.

Everything is streamed: memory holds one group of text pieces, `GROUP` characters, whatever the size of the corpus.
Byte-pair encoding, the one costly step, runs on all cores in the threads of `tokenizers`; characters and bytes are
encoded faster than a disk reads. Groups depend on the text alone, so the result does not depend on the machine, and an
interrupted preparation resumes after the last group it committed.
"""

import contextlib
import errno
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cleangpt.config import CorpusConfig
from cleangpt.corpora.card import card
from cleangpt.corpora.reading import find_files
from cleangpt.data.chat_template import ChatTemplate
from cleangpt.data.columns import Column
from cleangpt.data.dataset import DATASET, TokenDataset
from cleangpt.data.records import Records
from cleangpt.data.tokenizers import ModalityTokenizer, Tokenizer, load_tokenizer
from cleangpt.data.writer import DatasetWriter, Groups, SplitFacts
from cleangpt.environments.base import Environment
from cleangpt.errors import UserError, parsing
from cleangpt.files import PARTIAL
from cleangpt.hub import PREFIX, is_huggingface, is_local, path_offline
from cleangpt.validation import to_json

COMMIT_SECONDS = 2.0
"""Time between commits: at most this much work is lost in an interruption."""
ROWS_VERSION = "rows_version"
"""What a dataset says of the version of its rows; those that do not have the first."""


@dataclass(frozen=True, kw_only=True)
class Corpus(CorpusConfig):
    """How to make a dataset; its content depends on the fields, and on the files that they name."""

    local_fields: ClassVar[tuple[str, ...]] = ("files", "file", "tokenizer_file", "chat_template")
    """Which fields, where a corpus has them, name local files."""
    scoring_fields: ClassVar[tuple[str, ...]] = ()
    """Which fields say how checkpoints are scored; the dataset does not depend on them."""
    rows_version: ClassVar[int] = 1
    """One more wherever the same fields come to make other rows, so that users of older datasets are told."""

    def check(self) -> None:
        """Raises UserError for a field out of range; types have been checked already."""

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the dataset to `folder`, and shows progress on the console."""
        raise NotImplementedError

    def changed_inputs(self, dataset: TokenDataset) -> Iterator[str]:
        """What has changed since the dataset was made from it, such as "a.txt has changed"; without a network."""
        yield from changed_files(dataset)
        yield from changed_tokenizer(dataset, getattr(self, "tokenizer_file", None))

    def remedy(self, split: str) -> str:
        """What to do where the split has no tokens."""
        return "give more documents"

    def environment(self, dataset: TokenDataset) -> Environment | None:
        """The environment that scores checkpoints on the corpus's tasks; None: they are scored by the loss alone."""
        return None


CORPORA: dict[str, type[Corpus]] = {}
"""Corpora by name; registered in `corpora/__init__.py`, one line each."""


def has_relative_paths(corpus: CorpusConfig) -> bool:
    """Whether a field of a corpus names a local file relative to the current folder."""
    values = [vars(corpus).get(name) for name in getattr(corpus, "local_fields", ())]
    texts = [text for value in values if value for text in ([value] if isinstance(value, str) else value)]
    paths = [text.removeprefix(PREFIX) for text in texts if not is_huggingface(text) or is_local(text)]
    return any(not Path(path).is_absolute() and not path.startswith("~") for path in paths)


def dataset_fields(corpus: CorpusConfig) -> dict[str, Any]:
    """The fields that a corpus's dataset depends on, as JSON, with its kind.

    Raises:
        UserError: its class is not registered.
    """
    if type(corpus) not in CORPORA.values():
        name = type(corpus).__name__
        raise UserError(f"corpus is a {name}, which is not registered: CORPORA[{name.lower()!r}] = {name}")
    scoring = getattr(corpus, "scoring_fields", ())
    return {name: value for name, value in to_json(corpus, CORPORA).items() if name not in scoring}


def write_dataset(
    corpus: Corpus,
    folder: Path,
    tokenizer: Tokenizer,
    groups: Callable[[int], Groups],
    total: int,
    console: Console,
    *,
    source: Mapping[str, Any] | None = None,
    row_length: int | None = None,
    columns: Mapping[str, Column] | None = None,
    records: Mapping[str, Records] | None = None,
    group: Sequence[str] = (),
    chat_template: ChatTemplate | None = None,
    max_tokens: int | None = None,
) -> TokenDataset:
    """Writes the chunks of all groups; `groups(n)` yields those after the first n.

    With a `group`, neighbouring rows belong together, in the roles that it names, such as chosen and rejected.
    With `max_tokens` it stops after the group that reaches this number of training tokens.

    Raises:
        UserError: there is nothing to train on or to validate with.
    """
    writer = DatasetWriter(
        folder, dataset_fields(corpus), tokenizer, source=full_source(corpus, source or {}),
        row_length=row_length, masked=row_length is not None, columns=columns, records=records, group=group,
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
                        chunk.split, chunk.tokens, chunk.lengths, mask=chunk.mask, columns=chunk.columns,
                        records=chunk.records, text_bytes=chunk.text_bytes, counts=chunk.counts,
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
                raise UserError(_why_empty(split, writer.splits, corpus.remedy(split)))
        return writer.finish(lambda facts: card(folder.name, facts, tokenizer))
    finally:
        writer.close()


def _why_empty(split: str, splits: Mapping[str, SplitFacts], remedy: str) -> str:
    """Why a split has no tokens, and what to do."""
    some = any(facts.tokens for facts in splits.values())
    counts: Counter[str] = Counter()
    for name, facts in splits.items():
        counts.update(facts.counts if name == split or not some else {})
    if any(counts.values()):
        reasons = ", ".join(f"{name}: {count:,}" for name, count in counts.items() if count)
        return f"{f'the split {split}' if some else 'the dataset'} is empty, since everything was left out ({reasons})"
    if not some:
        return "the dataset is empty: there is no text, or every document is empty"
    return f"the split {split} is empty; {remedy}"


def _enough(writer: DatasetWriter, max_tokens: int | None) -> bool:
    """Whether there are `max_tokens` training tokens, and every document has ended."""
    unfinished = any(split.unfinished for split in writer.splits.values())
    return max_tokens is not None and _training_tokens(writer) >= max_tokens and not unfinished


def _training_tokens(writer: DatasetWriter) -> int:
    return writer.splits["train"].tokens if "train" in writer.splits else 0


@contextlib.contextmanager
def lock_folder(folder: Path, console: Console) -> Iterator[None]:
    """Waits while another process prepares the same dataset; the system releases the lock of a process that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"another process is preparing {folder}; waiting for it", markup=False, soft_wrap=True)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink()  # while still locked: a waiting process finds it gone and creates its own
        lock.release()


@contextlib.contextmanager
def user_errors(folder: Path) -> Iterator[None]:
    """Reports system errors in one line, and removes partial files after an error.

    An interruption is not an error: committed work stays, to be resumed.
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


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file, by which a change is noticed."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def full_source(corpus: Corpus, source: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataset says that it was made from: also the version of its rows."""
    return {ROWS_VERSION: corpus.rows_version, **source}


def changed_rows(corpus: Corpus, dataset: TokenDataset) -> Iterator[str]:
    """Whether another version of the corpus made the dataset."""
    if dataset.source.get(ROWS_VERSION, 1) != corpus.rows_version:
        yield "its rows were made by another version of the corpus"


def changed_files(dataset: TokenDataset, patterns: Sequence[str] = ()) -> Iterator[str]:
    """Which files of text have changed since the dataset was made from them.

    With the patterns by which they were found, also those that are new or removed; without, they may be elsewhere.
    """
    with parsing(dataset.folder / DATASET):
        before = {Path(name): (size, modified) for name, size, modified in dataset.source.get("files", [])}
    try:
        now = {path: stamp(path) for path in (find_files(patterns) if patterns else filter(Path.is_file, before))}
    except (UserError, OSError) as error:
        yield str(error)
        return
    yield from (f"{path} has changed" for path in sorted(before.keys() & now.keys()) if now[path] != before[path])
    yield from (f"{path} is a new file" for path in sorted(now.keys() - before.keys()))
    yield from (f"{path} was removed" for path in sorted(before.keys() - now.keys()) if patterns)


def changed_tokenizer(dataset: TokenDataset, file: str | None) -> Iterator[str]:
    """Whether the tokenizer in a file, if it is here, is no longer the one with which the dataset was made."""
    if file is not None and (path := path_offline(file)) is not None:
        try:
            made = dataset.tokenizer.text if isinstance(dataset.tokenizer, ModalityTokenizer) else dataset.tokenizer
            if load_tokenizer(path).to_json() != made.to_json():
                yield f"the tokenizer {file} has changed"
        except UserError as error:
            yield str(error)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )
