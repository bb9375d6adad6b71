"""Conversations as text: chat templates, and which tokens of a conversation are answers.

A conversation is a list of messages, each with a role (system, user, assistant) and its content. A Jinja template, as
in Hugging Face's tokenizers, defines how it is written. Templates may come from strangers, so they run in Jinja's
sandbox, where they see the messages, the names of special tokens and the date, and can neither call nor change
anything else, and in a separate process with a time limit (`data/rendering.py`). The template is stored as
`chat_template.json` in every dataset of conversations and in every checkpoint trained on one.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.rendering import BEGIN, END, Renderer, TemplateError, render_here
from cleangpt.data.special_tokens import END_OF_TEXT, HF_CONFIG, named_tokens
from cleangpt.data.spelling import GUARD, guarded, guarded_within, pattern, special_in, texts
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from cleangpt.errors import UserError, parsing, require
from cleangpt.files import read_json, read_text
from cleangpt.hub import local_path

CHAT_TEMPLATE, HF_TEMPLATE = "chat_template.json", "chat_template.jinja"
ASSISTANT = "assistant"
RENDERER = Renderer()
STAND_IN = "\ufdd3"
"""Stands for an answer that is not known yet; a noncharacter of Unicode."""
PLAIN = """\
{%- for message in messages -%}
{{ message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'assistant\\n' }}
{%- endif -%}
"""
"""For a tokenizer without a template: each message below its role; an answer ends with the end-of-text token."""

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
"""Functions that the assistant may call, each described by a JSON schema."""
Spans = list[tuple[int, int]]
"""First character of each answer, and the one after its last."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and the special tokens that it may use by name, such as `eos_token`."""

    source: str
    special: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = field(default=(), compare=False)
    """The special tokens that it was seen to end answers with, when the conversations of a dataset were rendered."""

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where the assistant's next answer starts.

        Raises:
            UserError: the template is invalid, refuses the conversation, or does what the sandbox forbids.
        """
        return _unmarked(self._render(messages, add_generation_prompt, tools))[0]

    def render_answers(
        self, messages: Sequence[Message], special: Collection[str], tools: Tools | None = None
    ) -> tuple[str, Spans]:
        """The text of a conversation, and the span of each answer in it, its end token included.

        A template may mark answers with ``{% generation %}``. Otherwise an answer is what its message adds to the text
        of the messages before it, without whitespace after a final `special` token. If a template writes ``user: Hi``
        and ``bot: Yo</s>`` on separate lines, the span of the answer is that of ``Yo</s>``.

        Raises:
            UserError: as `render`, or a message changes how those before it are written.
        """
        text, spans = _unmarked(self._render(messages, False, tools))
        if self.marks_answers:
            return text, spans
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self.render(messages[:number], True, tools)
                after = self.render(messages[: number + 1], tools=tools)
                if not (after.startswith(before) and text.startswith(after)):
                    raise UserError(
                        f"the chat template writes message {number + 1} differently once others follow, so its answers "
                        "cannot be located; put {% generation %} and {% endgeneration %} around them in the template"
                    )
                end = len(after.rstrip()) if after.rstrip().endswith(tuple(special)) else len(after)
                spans.append((len(before), end))
        return text, spans

    def render_guarded(
        self,
        messages: Sequence[Message],
        special: Collection[str],
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
    ) -> str | None:
        """The text with guards in the `special` tokens that messages and tools spell; None if they spell none.

        Raises:
            UserError: as `render`.
        """
        protected, protected_tools = guarded(messages, special), guarded_within(tools, special)
        if protected == list(messages) and protected_tools == tools:
            return None
        plain = self._render(messages, add_generation_prompt, tools)
        safe = self._render(protected, add_generation_prompt, protected_tools)
        return None if special_in(plain, special) == special_in(safe, special) else _unmarked(safe)[0]

    def around_answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the template writes between the generation prompt and the next answer, and what after the answer.

        Both are empty if the template does not let that be seen.
        """
        try:
            before = self.render(messages, add_generation_prompt=True)
            after = self.render([*messages, {"role": ASSISTANT, "content": STAND_IN}])
        except UserError:
            return "", ""
        if STAND_IN not in after:
            return "", ""
        written, _, rest = after.rpartition(STAND_IN)
        return written[len(before) :] if written.startswith(before) else "", rest

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks answers with ``{% generation %}``."""
        return re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.source) is not None

    def to_json(self) -> str:
        """The template as JSON text, for `find_template`."""
        facts: dict[str, Any] = {"template": self.source, **self.special}
        return json.dumps(facts | ({"ends": self.ends} if self.ends else {}), ensure_ascii=False, indent=2) + "\n"

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools | None = None) -> str:
        require("jinja2")
        for number, message in enumerate(messages, start=1):
            if any(BEGIN in text or END in text for text in texts(message)):
                raise UserError(f"message {number} has U+FDD0 or U+FDD1, not characters; remove them")
            if self.source == PLAIN and (message.get("tool_calls") or not isinstance(message.get("content"), str)):
                raise UserError(
                    f"message {number} has {'tool calls' if message.get('tool_calls') else 'no text'}, for which the "
                    "plain chat template has no form; give the chat template of a model that has"
                )
        # Without fields that are null, as in transformers: of content beside tool calls, templates would write "None".
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {
            "messages": given, "add_generation_prompt": add_generation_prompt,
            "tools": tools, "documents": None, **self.special,
        }  # fmt: skip
        try:
            return render_here(self.source, values) if self.source == PLAIN else RENDERER.render(self.source, values)
        except TemplateError as error:
            raise UserError(str(error)) from None


# Where a template comes from -----------------------------------------------------------------------------------------
def plain_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Our own template, for a tokenizer without one.

    Raises:
        UserError: the tokenizer has no end-of-text token to end an answer with.
    """
    special = _names(tokenizer)
    if encode_chat(tokenizer, [special.get("eos_token", "")])[0][0].tolist() != [tokenizer.eos_id]:
        raise UserError("the tokenizer has no end-of-text token, with which an answer would end; take another")
    return ChatTemplate(PLAIN, special)


def load_template(text: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template given by a user: a Jinja file, a folder with one, or ``hf:NAME``.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    path = local_path(text)
    if path.is_dir():
        if (found := find_template(path)) is None:
            raise UserError(f"{path} has no chat template; allowed: a folder with {HF_TEMPLATE}, or a file in Jinja")
        return found
    return ChatTemplate(_read(path), _names(tokenizer))


def find_template(folder: Path) -> ChatTemplate | None:
    """The template in a dataset, a checkpoint or a folder in Hugging Face's layout; None: it has none.

    Raises:
        UserError: its file is corrupt.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        content = read_json(folder / CHAT_TEMPLATE)
        if isinstance(content, dict) and "chat_template" in content:  # of a processor of Transformers
            content = {"template": content["chat_template"], **named_tokens(folder)}
        ends = content.pop("ends", []) if isinstance(content, dict) else None
        if not isinstance(ends, list) or not all(
            isinstance(text, str) for text in (content.get("template"), *content.values(), *ends)
        ):
            raise UserError(f"{folder / CHAT_TEMPLATE} is not a chat template: it needs a text in each of its fields")
        return ChatTemplate(content.pop("template"), content, tuple(ends))
    config = read_json(folder / HF_CONFIG) if (folder / HF_CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{folder / HF_CONFIG} is not a JSON object")
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        with parsing(folder / HF_CONFIG):
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if (folder / HF_TEMPLATE).is_file():
        source = _read(folder / HF_TEMPLATE)
    return ChatTemplate(source, named_tokens(folder)) if isinstance(source, str) else None


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that start and end a text, by their names in Hugging Face's templates."""
    names = {token: name for name, token in special_tokens(tokenizer).items()}
    around = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {key: names[token] for key, token in around.items() if token in names}


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except UserError as error:
        raise UserError(f"{error}; give a chat template, a file in Jinja") from None


# Tokens --------------------------------------------------------------------------------------------------------------
def check_messages(messages: object, place: str) -> list[dict[str, Any]]:
    """The messages of a conversation that came from a file, as templates expect them.

    Content in parts that are all text becomes one text; it may be null beside tool calls. Fields that are null, as in
    Parquet those that a message lacks, are left out.

    Raises:
        UserError: one is not an object with role and content; the message starts with `place`.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: no list of messages")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where} has no text as its role")
        given = {key: value for key, value in message.items() if value is not None}
        checked.append(given | {"content": _content(message, where)})
        check_characters(given, where)
    return checked


def check_characters(value: object, where: str) -> None:
    """Checks all texts in a JSON value, which may be written by a template.

    Raises:
        UserError: one has something that is not a character; the message starts with `where`.
    """
    for text in texts(value):
        if BEGIN in text or END in text:
            raise UserError(f"{where} has U+FDD0 or U+FDD1, not characters; remove them")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where} has an unpaired surrogate, which is not a character; remove it") from None


def _content(message: dict[str, Any], where: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return content
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} has no text as its content")
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    for part in parts:
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a part of type {part.get('type')!r} in its content; allowed: text")
    return "".join(part["text"] for part in parts)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens, by the names that stand for them in a rendered conversation."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.special
    if tokenizer.eos_id is None:
        return {}
    end = tokenizer.characters[tokenizer.eos_id] if isinstance(tokenizer, CharTokenizer) else END_OF_TEXT
    return {end: tokenizer.eos_id}


def encode_chat(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Token ids `(length,)` of rendered conversations, and each token's character span `(length, 2)`.

    Names of special tokens become these tokens, unlike in `Tokenizer.encode`.

    Raises:
        UserError: an unknown character, or a kind of tokenizer without such names.
    """
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.encode_special(texts)
    if isinstance(tokenizer, CharTokenizer):
        return [(tokenizer.encode(text), _from_to(np.arange(len(text)))) for text in texts]
    if isinstance(tokenizer, ByteTokenizer):
        return [_encode_bytes(tokenizer, text) for text in texts]
    raise UserError(f"a {type(tokenizer).__name__} cannot encode conversations; allowed: char, byte and bpe tokenizers")


def answer_mask(places: NDArray[np.int64], spans: Spans) -> NDArray[np.uint8]:
    """1 for each token `(length,)` with a character in one of the spans, given each token's span `(length, 2)`."""
    mask = np.zeros(len(places), np.uint8)
    for begin, end in spans:
        mask[(places[:, 0] < end) & (places[:, 1] > begin)] = 1
    return mask


def encode_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], written: tuple[str, str] = ("", "")
) -> list[int]:
    """The tokens of a conversation up to where the assistant's next answer starts.

    Special tokens are those that the template writes, not those that messages spell; `written[0]` becomes `written[1]`.

    Raises:
        UserError: as `ChatTemplate.render` and `encode_chat`; or a message has the character that ends a text.
    """
    special = special_tokens(tokenizer)
    safe = template.render_guarded(messages, special, add_generation_prompt=True)
    if safe is None:
        ((ids, _),) = encode_chat(tokenizer, [template.render(messages, add_generation_prompt=True).replace(*written)])
        return [int(token) for token in ids]
    if isinstance(tokenizer, CharTokenizer):
        raise UserError(f"a message has {next(iter(special))!r}, which ends a text for this tokenizer; leave it out")
    tokens: list[int] = []
    for number, part in enumerate(pattern(special).split(safe.replace(*written))):  # every other one is special
        text = part.replace(GUARD, "")
        tokens += [special[part]] if number % 2 else tokenizer.encode(text)[len(tokenizer.prefix) :].tolist()
    return tokens


def answer_ends(text: str, spans: Spans, special: Collection[str]) -> set[str]:
    """The special tokens that end answers in a rendered conversation: the last of each, else the one that follows."""
    ends = set()
    for begin, end in spans:
        last = next((name for name in special if text[begin:end].rstrip().endswith(name)), None)
        found = pattern(special).match(text[end:].lstrip())
        ends |= {last} if last is not None else {found[0]} if found else set()
    return ends


def stop_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: those that end any text, and those that the template was seen to put there."""
    special = special_tokens(tokenizer)
    return set(tokenizer.stop_ids) | {special[name] for name in template.ends if name in special}


def adds_blank(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer would put a blank of its own before a word that follows this rendered text."""
    if not isinstance(tokenizer, BPETokenizer) or not tokenizer.leading_blank:
        return False
    (before, _), (both, _) = tokenizer.encode_special([text, text + "a"])
    added = both[len(before) :].tolist()
    return both[: len(before)].tolist() == before.tolist() and b"".join(map(tokenizer.token_bytes, added)) == b" a"


def _encode_bytes(tokenizer: ByteTokenizer, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids, starts, at = [], [], 0
    for number, part in enumerate(text.split(END_OF_TEXT)):
        if number:
            ids.append(np.array([tokenizer.eos_id]))
            starts.append(np.array([at]))
            at += len(END_OF_TEXT)
        ids.append(tokenizer.encode(part))
        starts.append(np.repeat(np.arange(at, at + len(part)), [len(character.encode()) for character in part]))
        at += len(part)
    return np.concatenate(ids), _from_to(np.concatenate(starts))


def _from_to(starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([starts, starts + 1], axis=1)


# The text ------------------------------------------------------------------------------------------------------------
def _unmarked(text: str) -> tuple[str, Spans]:
    """A text without the marks around answers, and the spans that they marked."""
    plain, spans, begin = "", [], 0
    for part in re.split(f"([{BEGIN}{END}])", text):
        if part == BEGIN:
            begin = len(plain)
        elif part == END:
            spans.append((begin, len(plain)))
        else:
            plain += part
    return plain, spans
