"""Your own preferences: JSON lines or Parquet, as on the Hugging Face Hub.

    {"prompt": "…", "chosen": "…", "rejected": "…"}      pairs of texts
    {"chosen": […], "rejected": […]}                     pairs of conversations, as lists of messages
    {"prompt": "…", "completion": "…", "label": true}    single answers, desirable or not, with label_field

Only the answers count, with the token that ends each. `corpora/told.py` turns a line into texts, `corpora/rows.py`
answers into rows.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import write_dataset
from cleangpt.corpora.conversations import (
    changed_template,
    choose_template,
    known_tokenizer,
    warn_of_tools,
    without_special,
)
from cleangpt.corpora.reading import FORMS, Piece, find_files, is_plain, read_entries, split_documents
from cleangpt.corpora.rows import PAIR, RATED, Row, fitted, mismatched, padded, per_token
from cleangpt.corpora.text import TextCorpus, grouped, stamps, text_files
from cleangpt.corpora.told import Example, Fields, Told, example
from cleangpt.corpora.tools import IGNORED
from cleangpt.data.chat_template import ChatTemplate, answer_mask, encode_chat, special_tokens
from cleangpt.data.columns import Column
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.data.writer import Chunk, Groups
from cleangpt.errors import UserError
from cleangpt.validation import File

CUT, LONG = "truncated at the start of the prompt", "skipped, an answer longer than a row"
"""Counts on the card, besides the number of examples and those of `told.py`."""


@dataclass(frozen=True, kw_only=True)
class Preferences(TextCorpus):
    """Your own preferences between two answers, or labelled answers: one per line of JSON or row of Parquet.

    A hash of its position assigns each to a split. Rows that are too long lose the start of their prompt, both of a
    pair the same tokens; what does not fit even so is skipped, as are answers that are empty or alike, and texts with
    the name of a special token, which would be encoded as that token. The card counts all of these.
    """

    files: tuple[File, ...]
    """Paths, globs or folders: .jsonl or .json, also with .gz, .bz2, .xz or .zst, and .parquet."""
    prompt_field: str = "prompt"
    """Field or column with the prompt; conversations may contain it instead."""
    chosen_field: str = "chosen"
    """Field with the better answer."""
    rejected_field: str = "rejected"
    """Field with the worse answer."""
    margin_field: str | None = None
    """Field with a number, by how much the one is better, for a reward model; None: 0 for all."""
    label_field: str | None = None
    """For single answers: field that is true for a desirable answer; None: the data are pairs."""
    completion_field: str = "completion"
    """With label_field: field with the answer."""
    tools_field: str = "tools"
    """Field or column, which may be absent, with the functions that the assistant may call, a list of JSON schemas or
    this list as text; the chat template gets it as tools."""
    as_chat: bool = False
    """Write them by a chat template, texts as a question and its answer; needed for lists of messages. Needs
    jinja2."""
    chat_template: str | None = None
    """With as_chat: a Jinja file, a folder with one, or hf:NAME; None: the one next to tokenizer_file, else a plain one
    that writes each message below its role."""
    row: int = 512
    """Tokens per sample, padding included; data.seq_len must be equal to it."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.row + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        if not 2 <= self.row <= 2**31:
            raise UserError(f"corpus.row is {self.row}; allowed: a whole number of 2 or more")
        if self.chat_template is not None and not self.as_chat:
            raise UserError(f"corpus.chat_template is {self.chat_template!r}; allowed without corpus.as_chat: None")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        paths = find_files(self.files)
        if plain := next(filter(is_plain, paths), None):
            raise UserError(f"{plain} has no preferences; allowed: {FORMS}")
        given, known = known_tokenizer(self)
        template = choose_template(self.chat_template, self.tokenizer_file, known) if self.as_chat else None
        files = text_files(paths, partial(self._pieces, template=template, tokenizer=known))
        tokenizer = given or self.choose_tokenizer(without_special(files, known), console)

        def groups(start: int) -> Groups:
            for read, pieces in itertools.islice(grouped(files), start, None):
                examples = cast(list[Example], pieces)
                yield (
                    read,
                    [
                        self._chunk(split, [entry for entry in examples if entry.split == split], tokenizer)
                        for split in sorted({piece.split for piece in pieces})
                    ],
                )

        paired = self.label_field is None
        column = Column(dtype="float32" if paired else "uint8", role="extra")
        dataset = write_dataset(
            self, folder, tokenizer, groups, sum(file.bytes for file in files), console,
            source={"files": stamps(files)}, row_length=self.row_length, columns={self._column: column},
            group=PAIR if paired else RATED, chat_template=template,
        )  # fmt: skip
        warn_of_tools(dataset, console)
        return dataset

    def changed_inputs(self, dataset: TokenDataset) -> Iterator[str]:
        """What has changed since the dataset was made: also the chat template."""
        yield from super().changed_inputs(dataset)
        if self.as_chat:
            yield from changed_template(dataset, self.chat_template, self.tokenizer_file)

    @property
    def _column(self) -> str:
        return "margin" if self.label_field is None else "desirable"

    def _pieces(self, path: Path, name: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> Iterator[Piece]:
        fields = Fields(
            self.prompt_field, self.chosen_field, self.rejected_field, self.margin_field, self.label_field,
            self.completion_field, self.tools_field,
        )  # fmt: skip
        special = special_tokens(tokenizer)
        examples = (example(fields, *entry, template, special) for entry in self._entries(path))
        return split_documents(examples, name, self.val_fraction)

    def _entries(self, path: Path) -> Iterator[tuple[Any, str, int]]:
        single = [self.completion_field, self.label_field]
        wanted = [self.chosen_field, self.rejected_field, self.margin_field] if self.label_field is None else single
        return read_entries(
            path, [name for name in wanted if name is not None], optional=[self.prompt_field, self.tools_field]
        )

    def _chunk(self, split: str, examples: list[Example], tokenizer: Tokenizer) -> Chunk:
        """The rows of one split's examples."""
        counts = Counter({"examples": len(examples), CUT: 0, LONG: 0, IGNORED: 0})
        counts.update(entry.skip_reason for entry in examples if entry.skip_reason)
        examples = [entry for entry in examples if not entry.skip_reason]
        told = [text for entry in examples for text in entry.told]
        encoded = encode_chat(tokenizer, [text.text for text in told])
        rows = [ended(*found, text, tokenizer) for found, text in zip(encoded, told, strict=True)]
        together = [[*pair] for pair in zip(rows[::2], rows[1::2], strict=True)] if self.label_field is None else []
        kept, values = [], []
        for entry, group in zip(examples, together or mismatched(rows), strict=True):
            if (fit := fitted(group, self.row_length)) is None:
                counts[LONG] += 1
                continue
            counts[CUT] += len(fit[0].tokens) < len(group[0].tokens)
            counts[IGNORED] += entry.ignored_tools
            kept += fit
            values += [entry.value] * len(fit)
        tokens, mask = padded(kept, self.row_length)
        dtype = np.float32 if self.label_field is None else np.uint8
        text_bytes = sum(len(text.text.encode("utf-8")) for text in told)
        return Chunk(
            split, tokens.reshape(-1), np.full(len(kept), self.row_length), text_bytes, mask.reshape(-1), counts,
            {self._column: per_token(values, self.row_length, dtype)},
        )  # fmt: skip


def ended(ids: NDArray[np.int64], places: NDArray[np.int64], told: Told, tokenizer: Tokenizer) -> Row:
    """The row of a text, which ends where its answer does: with the template's token for that, or the end of text."""
    mask = answer_mask(places, list(told.answer))
    end = int(np.flatnonzero(mask)[-1]) + 1
    ids, mask = ids[:end], mask[:end]
    if tokenizer.eos_id is not None and int(ids[-1]) not in special_tokens(tokenizer).values():
        ids, mask = np.append(ids, tokenizer.eos_id), np.append(mask, np.uint8(1))
    return Row(ids, mask)
