"""Lines of preference data as texts: which part of a text is the answer, and which of two is better."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cleangpt.corpora.conversations import SPECIAL, known_messages
from cleangpt.corpora.reading import Piece, checked
from cleangpt.corpora.tools import tools_in
from cleangpt.data import spelling
from cleangpt.data.chat_template import ASSISTANT, ChatTemplate, Spans, Tools
from cleangpt.errors import UserError, nearest

EMPTY, ALIKE = "skipped, an empty prompt or answer", "skipped, both answers alike"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a line; see `Preferences`."""

    prompt: str
    chosen: str
    rejected: str
    margin: str | None
    label: str | None
    completion: str
    tools: str


@dataclass(frozen=True)
class Told:
    """A prompt and its answer as one text, and the character spans of the answer in it."""

    text: str
    answer: Spans


@dataclass(frozen=True)
class Example(Piece):
    """A pair, the chosen answer first, or a single answer."""

    told: tuple[Told, ...] = ()
    value: float = 0.0
    """The margin of a pair; 1 for a desirable answer, 0 for one that is not."""
    ignored_tools: bool = False
    """Whether it has tools that are not in the texts."""


def example(
    fields: Fields, entry: Any, location: str, read: int, template: ChatTemplate | None, special: Collection[str]
) -> Example:
    """One line or row.

    Args:
        fields: names of its fields.
        entry: its content.
        location: for messages.
        read: bytes of the file read so far.
        template: writes it as a conversation; None: as plain text.
        special: names of special tokens.

    Raises:
        UserError: a field is missing or of the wrong type, or the template fails.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{location}: {type(entry).__name__} where an object should be")
    names = [fields.chosen, fields.rejected] if fields.label is None else [fields.completion]
    prompt, answers = entry.get(fields.prompt), [_given(entry, name, location) for name in names]
    spelled = any(spelling.special_in(text, special) for text in spelling.texts([prompt, *answers]))
    tools = tools_in(entry, fields.tools, location)
    ignored = bool(tools)
    if template is None:
        told = [_plain(prompt, answer, fields, location) for answer in answers]
    else:
        conversations = _conversations(prompt, answers, fields, location)
        told = _rendered(conversations, tools, template, special, location)
        spelled = spelled or any(
            template.render_guarded(messages, special, tools=tools) is not None for messages, _ in conversations
        )
        ignored = ignored and template.render(conversations[0][0]) == told[0].text
    texts = [text.text for text in told]
    reason = SPECIAL if spelled else ""
    reason = reason or (EMPTY if any(not 0 < begin < end for text in told for begin, end in text.answer) else "")
    reason = reason or (ALIKE if len(texts) == 2 and texts[0] == texts[1] else "")
    return Example(
        "".join(texts), True, read, skip_reason=reason, told=tuple(told), value=_value(entry, fields, location),
        ignored_tools=ignored,
    )  # fmt: skip


def _given(entry: Mapping[str, Any], name: str, location: str) -> Any:
    if entry.get(name) is None:
        raise UserError(f"{location}: no field {name!r}; set the corpus's fields{nearest(name, entry)}")
    return entry[name]


def _value(entry: Mapping[str, Any], fields: Fields, location: str) -> float:
    name = fields.margin if fields.label is None else fields.label
    if name is None:
        return 0.0
    value = _given(entry, name, location)
    allowed = (bool, int) if fields.label is not None else (int, float)
    if not isinstance(value, allowed) or (fields.label is not None and value not in (0, 1)):
        raise UserError(f"{location}: {name} is {value!r}; allowed: {'true or false' if fields.label else 'a number'}")
    return float(value)


def _plain(prompt: Any, answer: Any, fields: Fields, location: str) -> Told:
    """Prompt and answer as they are."""
    if isinstance(prompt, list) or isinstance(answer, list):
        raise UserError(f"{location}: a list of messages; give --corpus.as-chat to write it by a chat template")
    before = checked("" if prompt is None else prompt, location, f"corpus.prompt_field, which is {fields.prompt!r}")
    text = before + checked(answer, location, "the corpus's fields")
    return Told(text, [(len(before), len(text))])


def _conversations(prompt: Any, answers: list[Any], fields: Fields, location: str) -> list[tuple[Messages, int]]:
    """The messages of each answer, its prompt included, and how many of them are the prompt."""
    before = _messages(prompt, "user", location) if prompt is not None else []
    whole = []
    for answer in answers:
        messages = _messages(answer, ASSISTANT, location)
        # An answer that begins with a question is a whole conversation.
        whole.append(messages if messages[0]["role"] != ASSISTANT else before + messages)
    if len(whole) == 1:
        return [(whole[0], len(whole[0]) - 1)]
    shared = next((n for n, pair in enumerate(zip(*whole, strict=False)) if pair[0] != pair[1]), min(map(len, whole)))
    shared = min(shared, *(len(messages) - 1 for messages in whole))
    if not shared:
        raise UserError(f"{location}: the answers share no prompt; set corpus.prompt_field")
    return [(messages, shared) for messages in whole]


def _messages(value: Any, role: str, location: str) -> Messages:
    """A list of messages; a text is one message in the given role."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return known_messages(value, location, "the content of messages")


def _rendered(
    conversations: list[tuple[Messages, int]],
    tools: Tools | None,
    template: ChatTemplate,
    special: Collection[str],
    location: str,
) -> list[Told]:
    """The texts of conversations; an answer is what the assistant says after the prompt."""
    told = []
    for messages, shared in conversations:
        answers = sum(message["role"] == ASSISTANT for message in messages[shared:])
        if not answers or messages[-1]["role"] != ASSISTANT:
            raise UserError(f"{location}: the last message is not the assistant's")
        try:
            text, spans = template.render_answers(messages, special, tools)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
        told.append(Told(text, spans[-answers:]))
    return told
