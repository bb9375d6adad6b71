"""Your own conversations, to fine-tune a model to answer: JSON lines or Parquet, rendered by a chat template.

Only the assistant's answers are targets, with the token that ends each (`data/chat_template.py`).
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from cleangpt.corpora.base import write_dataset
from cleangpt.corpora.packing import pack
from cleangpt.corpora.reading import (
    FORMS,
    Piece,
    TextFile,
    checked,
    find_files,
    is_plain,
    read_entries,
    split_documents,
    text_in,
)
from cleangpt.corpora.text import END_CHARACTER, TextCorpus, grouped, stamps, text_files
from cleangpt.corpora.tools import IGNORED, tools_in
from cleangpt.data import spelling
from cleangpt.data.chat_template import (
    ASSISTANT,
    ChatTemplate,
    Tools,
    answer_ends,
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
from cleangpt.hub import local_path, path_offline
from cleangpt.validation import File

ROLES = {role: role for role in spelling.ROLES}
ROLES |= {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Names that datasets use for roles, in any case."""
SEEN = 100
"""Conversations in which the tokens that end answers are looked for."""


NO_ANSWER, SPECIAL, CUT, ENDLESS = (
    "conversations skipped, no answer in the row",
    "conversations skipped, a special token in the text",
    "conversations truncated to a row",
    "conversations with an answer whose end is not a target",
)
"""Counts on the card, besides the number of conversations."""


@dataclass(frozen=True)
class Conversation(Piece):
    """A conversation as text."""

    ignored_tools: bool = False
    """Whether it has tools that the template does not write."""


@dataclass(frozen=True, kw_only=True)
class Chat(TextCorpus):
    """Your own conversations, one per line of JSON or row of Parquet. Needs jinja2.

    A hash of its position assigns each to a split. The targets are the assistant's answers, with the token that ends
    each. A conversation longer than a sample is truncated, and skipped if it then has no answer. It is also skipped if
    a message, in any field that the template writes, contains the name of a special token, which would be encoded as
    that token. The card counts all of these.
    """

    files: tuple[File, ...]
    """Paths, globs or folders: .jsonl or .json, also with .gz, .bz2, .xz or .zst, and .parquet."""
    messages_field: str = "messages"
    """Field or column with the list of messages."""
    role_field: str = "role"
    """Field of a message with its role: system, user or assistant; human, gpt, bot and model are understood too, in
    capitals or not."""
    content_field: str = "content"
    """Field of a message with its text, or with parts that are text; it may be null beside tool calls."""
    prompt_fields: tuple[str, ...] = ()
    """For data without a list of messages: fields, such as instruction and input, whose non-empty texts are joined into
    the user's only message."""
    response_field: str = "response"
    """With prompt_fields: the field with the answer."""
    tools_field: str = "tools"
    """Field or column, which may be absent, with the functions that the assistant may call, a list of JSON schemas or
    this list as text; the chat template gets it as tools."""
    system: str | None = None
    """System message for conversations without one; None: no system message."""
    chat_template: File | None = None
    """A chat template: a Jinja file, a folder with one, or hf:NAME; None: the one next to tokenizer_file, else a plain
    one that writes each message below its role."""
    pack: int = 512
    """Pack conversations into samples of this many tokens; data.seq_len must be equal to it."""

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
            raise UserError(f"{plain} has no conversations; allowed: {FORMS}")
        given, known = known_tokenizer(self)
        template = choose_template(self.chat_template, self.tokenizer_file, known)
        files = text_files(paths, partial(self._pieces, template=template, tokenizer=known))
        template = replace(template, ends=_ends(files, known))
        tokenizer = given or self.choose_tokenizer(without_special(files, known), console)
        dataset = write_dataset(
            self, folder, tokenizer, lambda start: encode_conversations(files, tokenizer, start, self.row_length),
            sum(file.bytes for file in files), console,
            source={"files": stamps(files)}, row_length=self.row_length, chat_template=template,
        )  # fmt: skip
        if endless := total(dataset, ENDLESS):
            console.print(
                f"{ENDLESS}: {endless:,}, so the model will not learn to end it; {_remedy(template)}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        warn_of_tools(dataset, console)
        return dataset

    def changed_inputs(self, dataset: TokenDataset) -> Iterator[str]:
        """What has changed since the dataset was made: also the chat template."""
        yield from super().changed_inputs(dataset)
        yield from changed_template(dataset, self.chat_template, self.tokenizer_file)

    def _pieces(self, path: Path, name: str, template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[Piece]:
        special = special_tokens(tokenizer)
        rendered = (
            _conversation(
                self._messages(entry, location), tools_in(entry, self.tools_field, location), location, read, template,
                special,
            )
            for entry, location, read in self._entries(path)
        )  # fmt: skip
        return split_documents(rendered, name, self.val_fraction)

    def _entries(self, path: Path) -> Iterator[tuple[Any, str, int]]:
        fields = [*self.prompt_fields, self.response_field] if self.prompt_fields else [self.messages_field]
        return read_entries(path, fields, optional=[self.tools_field])

    def _messages(self, entry: Any, location: str) -> list[dict[str, Any]]:
        """The conversation of one line or row.

        Raises:
            UserError: a field is missing or of the wrong type.
        """
        if self.prompt_fields:
            prompts = [_field(entry, name, location, "prompt_fields") for name in self.prompt_fields]
            response = _field(entry, self.response_field, location, "response_field")
            messages = [
                {"role": "user", "content": "\n\n".join(filter(None, prompts))},
                {"role": ASSISTANT, "content": response},
            ]
        else:
            messages = self._listed(entry, location)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def _listed(self, entry: Any, location: str) -> list[dict[str, Any]]:
        listed = entry.get(self.messages_field) if isinstance(entry, dict) else None
        if not isinstance(listed, list):
            hint = nearest(self.messages_field, entry) if isinstance(entry, dict) else ""
            raise UserError(
                f"{location}: no list of messages in a field {self.messages_field!r}; set corpus.messages_field{hint}"
            )
        messages = [
            {**message, "role": message.get(self.role_field), "content": message.get(self.content_field)}
            if isinstance(message, dict)
            else message
            for message in listed
        ]
        return known_messages(messages, location, "corpus.content_field")


def encode_conversations(files: list[TextFile], tokenizer: Tokenizer, start: int, row_length: int) -> Groups:
    """The groups of conversations, packed into rows, after the first `start` groups."""
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
    counts = Counter({"conversations": len(pieces), SPECIAL: 0, NO_ANSWER: 0, CUT: 0, ENDLESS: 0, IGNORED: 0})
    ends = tokenizer.stop_ids.union(special_tokens(tokenizer).values())
    counts.update(piece.skip_reason for piece in pieces if piece.skip_reason)
    pieces = [piece for piece in pieces if not piece.skip_reason]
    documents, masks, text_bytes = [], [], 0
    for piece, (ids, places) in zip(pieces, encode_chat(tokenizer, [piece.text for piece in pieces]), strict=True):
        mask = answer_mask(places, list(piece.answers))
        if tokenizer.eos_id is not None and ids[-1:].tolist() != [tokenizer.eos_id]:
            ids, mask = np.append(ids, tokenizer.eos_id), np.append(mask, 0)
        counts[ENDLESS] += not ends.issuperset(ids[mask == 1][-1:].tolist())
        if not mask[1:row_length].any():
            counts[NO_ANSWER] += 1
            continue
        counts[CUT] += len(ids) > row_length
        documents.append(ids[:row_length])
        masks.append(mask[:row_length])
        counts[IGNORED] += cast(Conversation, piece).ignored_tools
        text_bytes += len(piece.text.encode("utf-8"))
    tokens, mask = pack(documents, row_length, masks)
    lengths = np.full(len(tokens), row_length, np.int64)
    return Chunk(split, tokens.reshape(-1), lengths, text_bytes, mask.reshape(-1), counts)


def _conversation(
    messages: list[dict[str, Any]],
    tools: Tools | None,
    location: str,
    read: int,
    template: ChatTemplate,
    special: Mapping[str, int],
) -> Conversation:
    """A conversation as text."""
    if all(message["role"] != ASSISTANT for message in messages):
        return Conversation("", True, read, skip_reason=NO_ANSWER)
    try:
        if template.render_guarded(messages, special, tools=tools) is not None:
            return Conversation("", True, read, skip_reason=SPECIAL)
        text, answers = template.render_answers(messages, special, tools)
        ignored = bool(tools) and template.render(messages) == text
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    return Conversation(text, True, read, answers=tuple(answers), ignored_tools=ignored)


def known_messages(messages: object, location: str, setting: str) -> list[dict[str, Any]]:
    """`check_messages`, with the roles that templates know; `setting` chooses the field of the text.

    Raises:
        UserError: as `check_messages`, or a text could not be in a plain text file.
    """
    known = check_messages(messages, location)
    for message in known:
        message["role"] = ROLES.get(message["role"].strip().lower(), message["role"])
        checked(message["content"] or "", location, setting)
    return known


def total(dataset: TokenDataset, count: str) -> int:
    """A count on the card, over all splits."""
    return sum(split["counts"].get(count, 0) for split in dataset.description["splits"].values())


def warn_of_tools(dataset: TokenDataset, console: Console) -> None:
    """Says in one line how many conversations have tools of which the model will not learn."""
    if ignored := total(dataset, IGNORED):
        remedy = "give a chat template that writes tools" if dataset.chat_template else "give corpus.as_chat"
        console.print(
            f"{IGNORED}: {ignored:,}, so the model will not learn to call them; {remedy}", markup=False, soft_wrap=True
        )


def known_tokenizer(corpus: TextCorpus) -> tuple[Tokenizer | None, Tokenizer]:
    """The tokenizer of `tokenizer_file`, or None if it is to be learned; and one with the same special tokens."""
    if corpus.tokenizer_file is not None:
        given = load_tokenizer(corpus.tokenizer_file)
        return given, given
    return None, CharTokenizer(END_CHARACTER, END_CHARACTER) if corpus.tokenizer == "char" else ByteTokenizer()


def choose_template(given: str | None, tokenizer_file: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template given, or the one next to the tokenizer's file, or a plain one."""
    if given is not None:
        return load_template(given, tokenizer)
    if tokenizer_file is not None:
        path = local_path(tokenizer_file)
        if found := find_template(path if path.is_dir() else path.parent):
            return found
    return plain_template(tokenizer)


def changed_template(dataset: TokenDataset, given: str | None, tokenizer_file: str | None) -> Iterator[str]:
    """Whether `choose_template` would no longer choose the template with which the dataset was made."""
    named = given or tokenizer_file
    if named is not None and (path := path_offline(named)) is not None:
        try:
            if choose_template(given and str(path), tokenizer_file and str(path), dataset.tokenizer) != (
                dataset.chat_template
            ):
                yield f"the chat template of {named} has changed"
        except UserError as error:
            yield str(error)


def _ends(files: list[TextFile], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens that end answers, as seen in the first conversations."""
    special = special_tokens(tokenizer)
    answered = (piece for file in files for piece in file.pieces() if piece.answers)
    seen = (answer_ends(piece.text, list(piece.answers), special) for piece in itertools.islice(answered, SEEN))
    return tuple(sorted(set().union(*seen)))


def _remedy(template: ChatTemplate) -> str:
    if template.marks_answers:
        return "put {% endgeneration %} after the token that ends an answer in the chat template"
    return "let the chat template write eos_token after an answer"


def without_special(files: list[TextFile], tokenizer: Tokenizer) -> list[TextFile]:
    """The files with the names of special tokens removed from their text, to train a tokenizer on."""

    def without(file: TextFile) -> Iterator[Piece]:
        for piece in file.pieces():
            text = piece.text
            for name in special_tokens(tokenizer):
                text = text.replace(name, "")
            yield replace(piece, text=text)

    return [TextFile(file.path, file.bytes, partial(without, file)) for file in files]


def _field(entry: Any, name: str, location: str, field: str) -> str:
    """The text in a field of a line or row; empty where it is null."""
    text = text_in(entry, name, location, f"corpus.{field}")
    check_messages([{"role": "user", "content": text}], location)
    return text
