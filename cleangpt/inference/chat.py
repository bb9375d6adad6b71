"""A conversation with a model that was trained on conversations: messages in, the assistant's next answer out.

The answer is what a message of the assistant would have as its content: without what the template writes before it.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from cleangpt.data.chat_template import (
    ChatTemplate,
    Message,
    adds_blank,
    answer_ends,
    special_tokens,
    stop_tokens,
)
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.inference.engine import Engine
from cleangpt.inference.images import read_conversation
from cleangpt.inference.sampling import Sampling
from cleangpt.inference.text import TextStreamer, stream_tokens
from cleangpt.models.base import LanguageModel


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    device: torch.device,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """Streams the assistant's answer to a conversation, until the template's end token or the end of text.

    The content of a message is a text, or a list of parts, for a model that reads images: see `read_conversation`.

    Raises:
        UserError: the template fails, the tokenizer does not know a character of a message, or a picture cannot be
            read.
    """
    messages, prompt, inputs = read_conversation(model, tokenizer, template, messages)
    special = special_tokens(tokenizer)
    lead, rest = template.around_answer(messages)
    ends = stop_tokens(template, tokenizer) | {special[name] for name in answer_ends(rest, [(0, 0)], special)}
    text = template.render(messages, add_generation_prompt=True)
    streamer = TextStreamer(tokenizer, begins=adds_blank(tokenizer, text + lead))
    engine = Engine(model, device, vocab_size=tokenizer.vocab_size, eos_ids=ends)

    def pieces() -> Iterator[str]:
        count = 0
        for token in stream_tokens(engine, prompt, max_new_tokens, sampling, inputs=inputs):
            count += 1
            yield streamer.push(token.id)
        yield streamer.flush(cut=count == max_new_tokens)

    yield from _without(lead, pieces())


def _without(lead: str, pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text without `lead` at its start, where it starts so."""
    held = ""
    for piece in pieces:
        held += piece
        if len(held) < len(lead) and lead.startswith(held):
            continue
        yield held.removeprefix(lead)
        held = lead = ""
    yield held
