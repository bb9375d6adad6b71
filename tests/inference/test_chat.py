"""An answer is what the model writes after the rendered conversation, to where its template ends answers."""

import pytest
import torch

from cleangpt.data.chat_template import ChatTemplate, encode_chat, plain_template, stop_tokens
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.inference.chat import answer
from cleangpt.inference.sampling import GREEDY
from tests.scripted import Scripted

pytest.importorskip("jinja2")
CPU = torch.device("cpu")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]


class Replies(Scripted):
    """Writes one text, once it has read all of another."""

    def __init__(self, after: list[int], reply: list[int]) -> None:
        super().__init__(257, max_seq_len=512)
        self.after, self.reply = after, reply

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        assert tokens[0, : len(self.after)].tolist() == self.after
        for place, token in enumerate(self.reply, start=len(self.after) - 1):
            if place < tokens.shape[1]:
                logits[0, place, token] = 1
        return logits


@pytest.mark.parametrize("end", [256, None], ids=["its end", "the most tokens"])
def test_an_answer_follows_the_rendered_conversation_and_ends_where_the_template_ends_it(end: int | None) -> None:
    tokenizer = ByteTokenizer()
    template = plain_template(tokenizer)
    ((ids, _),) = encode_chat(tokenizer, [template.render(MESSAGES, add_generation_prompt=True)])
    reply = [*"Así.".encode(), *([] if end is None else [end]), *b" And more."]
    pieces = list(answer(
        Replies(ids.tolist(), reply), tokenizer, template, MESSAGES, CPU, max_new_tokens=8, sampling=GREEDY
    ))  # fmt: skip
    assert "".join(pieces) == ("Así." if end else "Así. An")
    assert stop_tokens(template, tokenizer) == {256}


def test_a_template_that_begins_a_text_decides_what_the_model_reads() -> None:
    tokenizer = ByteTokenizer()
    template = ChatTemplate(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        {"eos_token": "<|endoftext|>"},
    )
    read = [*b"<system>Be brief.", 256, *b"<user>Well?", 256, *b"<assistant>"]
    pieces = answer(
        Replies(read, [*b"Yes.", 256]), tokenizer, template, MESSAGES, CPU, max_new_tokens=20, sampling=GREEDY
    )
    assert "".join(pieces) == "Yes."
