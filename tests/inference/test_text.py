"""Text comes as soon as its characters are whole, and ends before a stop text."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.bpe import BPETokenizer
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer
from cleangpt.errors import UserError
from cleangpt.inference.sampling import GREEDY, Sampling
from cleangpt.inference.text import (
    TextChunk,
    TextStreamer,
    complete,
    prompt_tokens,
    sample_text,
    stream,
    validation_prompt,
)
from cleangpt.models.gpt import GPT, GPTConfig
from tests.scripted import Scripted
from tests.sentence_piece import METASPACE, PREPENDING

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


LIKE_LLAMA = BPETokenizer(PREPENDING)


class Continues(Scripted):
    """Says what comes next in one list of tokens, whatever it has read."""

    def __init__(self, tokens: list[int], vocab_size: int = 400) -> None:
        super().__init__(vocab_size)
        self.tokens = tokens

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        following = [self.tokens[min(place + 1, len(self.tokens) - 1)] for place in range(tokens.shape[1])]
        logits = torch.nn.functional.one_hot(torch.tensor(following), self.config.vocab_size or 0)
        return 1e4 * logits.float().expand(len(tokens), -1, -1)


@pytest.mark.parametrize("content", [PREPENDING, METASPACE], ids=["prepending", "metaspace"])
@pytest.mark.parametrize("prompt", ["the", "the cat", "", "the cat\n", "é"])
@pytest.mark.parametrize("added", ["the cat sat", "\n the", " ", "é 漢", "  the"])
def test_what_continues_a_prompt_keeps_its_first_blank(content: str, prompt: str, added: str) -> None:
    tokenizer = BPETokenizer(content)
    text = f"{prompt} {added}" if prompt else added
    tokens = [*tokenizer.encode(text).tolist(), 2]
    if tokens[: len(prompt_tokens(tokenizer, prompt))] != prompt_tokens(tokenizer, prompt):
        pytest.skip("the prompt's end is part of a longer token")
    model = Continues(tokens)
    streamed = texts(stream(model, tokenizer, prompt, CPU, max_new_tokens=50, sampling=GREEDY))
    completed = texts(complete(model, tokenizer, [prompt], CPU, max_new_tokens=50, sampling=GREEDY)[0])
    assert prompt + "".join(streamed) == prompt + "".join(completed) == text


def test_a_special_token_within_a_text_takes_no_blank_away() -> None:
    tokens = LIKE_LLAMA.encode("the cat").tolist()
    model = Continues([*tokens, 1, *tokens[1:], 0, *tokens[1:], 2])
    shown = texts(stream(model, LIKE_LLAMA, "the", CPU, max_new_tokens=50, sampling=GREEDY))
    assert "the" + "".join(shown) == "the cat the cat the cat"


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("draft", [False, True])
def test_a_limit_within_a_character_shows_nothing_of_it(count: int, draft: bool) -> None:
    text, tokenizer = "né日🙂", ByteTokenizer()
    model = Continues([65, *text.encode(), 256], 257)
    shown = "".join(texts(stream(
        model, tokenizer, "A", CPU, max_new_tokens=count, sampling=GREEDY, draft=model if draft else None
    )))  # fmt: skip
    assert shown == text.encode()[:count].decode("utf-8", "ignore")
    (row,) = complete(model, tokenizer, ["A"], CPU, max_new_tokens=count, sampling=GREEDY)
    assert "".join(texts(row)) == shown


@pytest.mark.parametrize("count", range(9))
def test_a_sample_of_a_run_ends_with_a_whole_character(count: int) -> None:
    model = Continues([65, *"né日🙂".encode(), 256], 257)
    dataset: Any = SimpleNamespace(tokenizer=ByteTokenizer(), vocab_size=257)
    text = sample_text(model, dataset, "A", count, CPU, seed=1)
    assert "\ufffd" not in text and text.startswith("A")


@pytest.mark.parametrize("text", ["plain text, and more of it", "日本語の文章です", "né日🙂 né日🙂 né日🙂", "🙂"])
def test_a_run_is_sampled_from_whole_characters(text: str) -> None:
    tokens = np.array([*text.encode()])
    split = SimpleNamespace(tokens=len(tokens), masked=False, read=lambda start, length: tokens[start : start + length])
    dataset: Any = SimpleNamespace(tokenizer=ByteTokenizer(), splits={"val": split})
    prompt = bytes(validation_prompt(dataset).tolist())
    assert prompt == text.encode()[:16].decode("utf-8", "ignore").encode()


def test_a_character_that_the_model_itself_leaves_incomplete_is_shown_as_such() -> None:
    model = Continues([65, 0xE6, 0x97, 256], 257)
    assert "".join(texts(stream(model, ByteTokenizer(), "A", CPU, max_new_tokens=9, sampling=GREEDY))) == "\ufffd"


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
