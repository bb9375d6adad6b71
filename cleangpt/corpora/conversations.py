"""Conversations of your own, to teach a model to answer: JSON lines or Parquet, rendered by a chat template.

Only what the assistant says is learned, with the token that ends it (`data/chat_template.py`).
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cleangpt.corpora.base import write_dataset
from cleangpt.corpora.packing import pack
from cleangpt.corpora.reading import (
    Piece,
    TextFile,
    checked,
    find_files,
    is_plain,
    json_lines,
    parquet_rows,
    split_documents,
)
from cleangpt.corpora.text import END_CHARACTER, TextCorpus, grouped, stamps, text_files
from cleangpt.data.chat_template import (
    ASSISTANT,
    ChatTemplate,
    answer_mask,
    check_messages,
    encode_chat,
    find_template,
    load_template,
    plain_template,
    special_tokens,
)
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from cleangpt.data.writer import Chunk, Groups
from cleangpt.errors import UserError, nearest
from cleangpt.hub import local_path

ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Other names for roles that data sets use."""


NO_ANSWER, SPECIAL, CUT = (
    "conversations left out without an answer in the row",
    "conversations left out that spell a special token",
    "conversations cut at the end of a row",
)
"""What the card counts, beside all conversations."""


@dataclass(frozen=True, kw_only=True)
class Chat(TextCorpus):
    """Conversations; each line of JSON or row of Parquet is one. Needs cleangpt[chat].

    They fall into either split whole, by a hash of their place. The loss counts what the assistant says, with the token
    that ends it. A conversation longer than a sample is cut at the sample's end; one that then has no answer is left
    out, and so is one in which someone spells a special token, for it would be taken for one. The card counts them.
    """

    files: tuple[str, ...]
    """Paths, globs or folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet."""
    messages_field: str = "messages"
    """Field or column with the list of messages."""
    role_field: str = "role"
    """Field of a message that says who speaks: system, user, assistant; human and gpt are understood."""
    content_field: str = "content"
    """Field of a message that holds its text."""
    prompt_fields: tuple[str, ...] = ()
    """Instead of a list of messages: the fields whose texts, those that are not empty, make the user's only message,
    such as instruction and input."""
    response_field: str = "response"
    """With prompt_fields: the field that holds the answer."""
    system: str | None = None
    """Begins every conversation that has no system message of its own; none: nothing does."""
    chat_template: str | None = None
    """A file in Jinja, or a folder with one (hf:NAME is one too); none: the one beside tokenizer_file, or where there
    is none a plain one: each message below its role."""
    pack: int = 512
    """Pack whole conversations into samples of so many tokens, which data.seq_len must then be."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.pack + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        if self.pack < 1:
            raise UserError(f"corpus.pack is {self.pack}; allowed: a whole number of 1 or more")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        paths = find_files(self.files)
        if plain := next(filter(is_plain, paths), None):
            raise UserError(f"{plain} is no list of conversations; allowed: .jsonl, .jsonl.gz, .jsonl.zst, .parquet")
        given = None if self.tokenizer_file is None else load_tokenizer(self.tokenizer_file)
        # Its special tokens are those of the tokenizer that is learned from what the template writes.
        known = given or (CharTokenizer(END_CHARACTER, END_CHARACTER) if self.tokenizer == "char" else ByteTokenizer())
        template = self._template(known)
        files = text_files(paths, partial(self._pieces, template=template, tokenizer=known))
        tokenizer = given or self.choose_tokenizer(_plain(files, known), console)
        return write_dataset(
            self, folder, tokenizer, lambda start: encode_conversations(files, tokenizer, start, self.row_length),
            sum(file.bytes for file in files), console,
            source={"files": stamps(files)}, row_length=self.row_length, chat_template=template,
        )  # fmt: skip

    def _template(self, tokenizer: Tokenizer) -> ChatTemplate:
        if self.chat_template is not None:
            return load_template(self.chat_template, tokenizer)
        if self.tokenizer_file is not None:
            path = local_path(self.tokenizer_file)
            if found := find_template(path if path.is_dir() else path.parent):
                return found
        return plain_template(tokenizer)

    def _pieces(self, path: Path, name: str, template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[Piece]:
        special = special_tokens(tokenizer)
        spelled = re.compile("|".join(map(re.escape, special)) or "(?!)")
        rendered = (_piece(self._messages(entry, place), place, read, template, spelled, special)
                    for entry, place, read in self._entries(path))  # fmt: skip
        return split_documents(rendered, name, self.val_fraction)

    def _entries(self, path: Path) -> Iterator[tuple[Any, str, int]]:
        if path.suffix.lower() == ".parquet":
            columns = [*self.prompt_fields, self.response_field] if self.prompt_fields else [self.messages_field]
            return parquet_rows(path, columns)
        return json_lines(path)

    def _messages(self, entry: Any, place: str) -> list[dict[str, Any]]:
        """The conversation of one line or row.

        Raises:
            UserError: a field is missing, or holds something else.
        """
        if self.prompt_fields:
            prompts = [_field(entry, name, place, "prompt_fields") for name in self.prompt_fields]
            response = _field(entry, self.response_field, place, "response_field")
            messages = [
                {"role": "user", "content": "\n\n".join(filter(None, prompts))},
                {"role": ASSISTANT, "content": response},
            ]
        else:
            messages = self._listed(entry, place)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def _listed(self, entry: Any, place: str) -> list[dict[str, Any]]:
        listed = entry.get(self.messages_field) if isinstance(entry, dict) else None
        if not isinstance(listed, list):
            hint = nearest(self.messages_field, entry) if isinstance(entry, dict) else ""
            raise UserError(
                f"{place}: no list of messages in a field {self.messages_field!r}; set corpus.messages_field{hint}"
            )
        messages = [
            {**message, "role": message.get(self.role_field), "content": message.get(self.content_field)}
            if isinstance(message, dict)
            else message
            for message in listed
        ]
        for message in check_messages(messages, place):
            message["role"] = ROLES.get(message["role"], message["role"])
            checked(message["content"], place, "corpus.content_field")
        return messages


def encode_conversations(files: list[TextFile], tokenizer: Tokenizer, start: int, row_length: int) -> Groups:
    """The groups of files of conversations, packed into rows, without the first `start`."""
    for read, pieces in itertools.islice(grouped(files), start, None):
        splits = sorted({piece.split for piece in pieces})
        yield (
            read,
            [
                _chunk(split, [piece for piece in pieces if piece.split == split], tokenizer, row_length)
                for split in splits
            ],
        )


def _chunk(split: str, pieces: list[Piece], tokenizer: Tokenizer, row_length: int) -> Chunk:
    """The conversations of one split in rows; each ends with the end-of-text token, where the tokenizer has one."""
    counts = Counter({"conversations": len(pieces), SPECIAL: 0, NO_ANSWER: 0, CUT: 0})
    counts.update(piece.skipped_ranges for piece in pieces if piece.skipped_ranges)
    pieces = [piece for piece in pieces if not piece.skipped_ranges]
    documents, masks, text_bytes = [], [], 0
    for piece, (ids, places) in zip(pieces, encode_chat(tokenizer, [piece.text for piece in pieces]), strict=True):
        mask = answer_mask(places, list(piece.answers))
        if tokenizer.eos_id is not None and ids[-1:].tolist() != [tokenizer.eos_id]:
            ids, mask = np.append(ids, tokenizer.eos_id), np.append(mask, 0)
        if not mask[1:row_length].any():
            counts[NO_ANSWER] += 1
            continue
        counts[CUT] += len(ids) > row_length
        documents.append(ids[:row_length])
        masks.append(mask[:row_length])
        text_bytes += len(piece.text.encode("utf-8"))
    tokens, mask = pack(documents, row_length, masks)
    lengths = np.full(len(tokens), row_length, np.int64)
    return Chunk(split, tokens.reshape(-1), lengths, text_bytes, mask.reshape(-1), counts)


def _piece(
    messages: list[dict[str, Any]],
    place: str,
    read: int,
    template: ChatTemplate,
    spelled: re.Pattern[str],
    special: Mapping[str, int],
) -> Piece:
    """A conversation as text."""
    if any(spelled.search(message["content"]) for message in messages):
        return Piece("", True, read, skipped_ranges=SPECIAL)
    if all(message["role"] != ASSISTANT for message in messages):
        return Piece("", True, read, skipped_ranges=NO_ANSWER)
    try:
        text, answers = template.render_answers(messages, special)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return Piece(text, True, read, answers=tuple(answers))


def _plain(files: list[TextFile], tokenizer: Tokenizer) -> list[TextFile]:
    """The files without the names of special tokens, to learn a tokenizer from."""

    def without(file: TextFile) -> Iterator[Piece]:
        for piece in file.pieces():
            text = piece.text
            for name in special_tokens(tokenizer):
                text = text.replace(name, "")
            yield replace(piece, text=text)

    return [TextFile(file.path, file.bytes, partial(without, file)) for file in files]


def _field(entry: Any, name: str, place: str, field: str) -> str:
    """The text in a field of a line or row; empty where it is null."""
    if not isinstance(entry, dict) or name not in entry:
        hint = nearest(name, entry) if isinstance(entry, dict) else ""
        raise UserError(f"{place}: no field {name!r}; set corpus.{field}{hint}")
    text = checked(entry[name] or "", place, f"corpus.{field}")
    check_messages([{"role": "user", "content": text}], place)
    return text
