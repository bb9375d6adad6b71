"""Text comes as soon as its characters are whole, and ends before a stop text."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer
from cleangpt.errors import UserError
from cleangpt.inference.sampling import GREEDY, Sampling
from cleangpt.inference.text import TextChunk, TextStreamer, complete, prompt_tokens, stream
from cleangpt.models.gpt import GPT, GPTConfig
from tests.scripted import Scripted

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=257, max_seq_len=64, n_layers=1, n_heads=1, dim=8)


class Writes(Scripted):
    """Writes one text after any prompt of two bytes, byte by byte."""

    def __init__(self, text: str) -> None:
        super().__init__(257)
        self.tokens = [*text.encode(), 256]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        for place in range(1, tokens.shape[1]):
            logits[:, place, self.tokens[min(place - 1, len(self.tokens) - 1)]] = 1
        return logits


def texts(chunks: Iterator[TextChunk] | list[TextChunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


def test_a_stream_gives_whole_characters() -> None:
    chunks = texts(stream(Writes("né 日 ok"), ByteTokenizer(), ">>", CPU, max_new_tokens=50, sampling=GREEDY))
    assert "".join(chunks) == "né 日 ok"
    assert "�" not in "".join(chunks) and "日" in chunks


def test_a_stream_tells_each_token_and_what_it_completed() -> None:
    chunks = list(stream(Writes("né"), ByteTokenizer(), ">>", CPU, max_new_tokens=50, sampling=GREEDY))
    assert [chunk.text for chunk in chunks] == ["n", "", "é", ""]
    assert [chunk.token and chunk.token.id for chunk in chunks] == [*"né".encode(), None]


@given(text=st.text("ab", max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    """Wherever that begins and ends among the tokens; and no more is held back than may begin one."""
    streamer, given_out = TextStreamer(ByteTokenizer(), stops), ""
    for number, token in enumerate(text.encode(), start=1):
        given_out += streamer.push(token)
        if not streamer.stopped:
            held = text[len(given_out) : number]
            assert not held or any(stop.startswith(held) for stop in stops)
    given_out += streamer.flush()
    # Of several, the one that is whole first counts; of those whole at once, the one that begins first.
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    assert given_out == (text[: min(found)[1]] if found else text)


def test_several_prompts_are_completed_side_by_side_as_if_each_were_alone() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    options = {"max_new_tokens": 30, "stop": ["e", "\0"]}
    prompts = ["a", "something longer", None]
    together = complete(model, ByteTokenizer(), prompts, CPU, sampling=Sampling(seed=5), **options)
    for number, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        alone = stream(model, ByteTokenizer(), prompt, CPU, sampling=Sampling(seed=5 + number), **options)
        assert "".join(texts(row)) == "".join(texts(alone))


def test_drafts_serve_a_stream_as_well() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    plain, drafted = (
        texts(stream(model, ByteTokenizer(), "ab", CPU, max_new_tokens=20, sampling=GREEDY, draft=draft))
        for draft in (None, model)
    )
    assert plain == drafted


def test_without_a_prompt_a_text_begins_as_a_document_does() -> None:
    assert prompt_tokens(ByteTokenizer(), None) == [256]
    assert prompt_tokens(CharTokenizer("ab\n"), None) == [2]
    assert prompt_tokens(CharTokenizer("ab"), "") == [0]


def test_an_unknown_character_in_a_prompt_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="does not know the character 'ü'"):
        list(stream(Writes(""), CharTokenizer("abc"), "aü", CPU, max_new_tokens=1, sampling=GREEDY))
