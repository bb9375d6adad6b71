"""A conversation with a model that was trained on conversations: messages in, the assistant's next answer out."""

from collections.abc import Iterator, Sequence

import torch

from cleangpt.data.chat_template import ChatTemplate, Message, encode_chat, stop_tokens
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.inference.engine import Engine
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

    Raises:
        UserError: the template fails, or the tokenizer does not know a character of a message.
    """
    text = template.render(messages, add_generation_prompt=True)
    ((ids, _),) = encode_chat(tokenizer, [text])
    engine = Engine(model, device, vocab_size=tokenizer.vocab_size, eos_ids=stop_tokens(template, tokenizer))
    streamer = TextStreamer(tokenizer)
    for token in stream_tokens(engine, ids.tolist(), max_new_tokens, sampling):
        yield streamer.push(token.id)
    yield streamer.flush()
