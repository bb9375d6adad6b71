"""A conversation with a model that was trained on some: messages in, the assistant's next answer out."""

from collections.abc import Iterator, Sequence

import torch

from cleangpt.data.chat_template import ChatTemplate, Message, encode_chat, stop_tokens
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.inference.engine import generate
from cleangpt.inference.sampling import Sampling
from cleangpt.inference.text import Writer
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
    """The assistant's answer to a conversation, as it comes, to where the template or the end of text ends it.

    Raises:
        UserError: the template fails, or a message has a character that the tokenizer does not know.
    """
    text = template.render(messages, add_generation_prompt=True)
    ((ids, _),) = encode_chat(tokenizer, [text])
    rows = generate(
        model, [ids.tolist()], device, max_new_tokens=max_new_tokens, sampling=sampling,
        vocab_size=tokenizer.vocab_size, ends=stop_tokens(template, tokenizer),
    )  # fmt: skip
    writer = Writer(tokenizer)
    for (token,) in rows:
        assert token is not None
        yield writer.push(token.id)
    yield writer.flush()
