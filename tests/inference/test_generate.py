"""Generation draws from the distribution it is told to, and greedy generation is Hugging Face's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer
from cleangpt.errors import UserError
from cleangpt.inference.generate import draw, greedy, sample
from cleangpt.inference.text import stream
from cleangpt.models.gpt import GPT, GPTConfig, to_huggingface

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=50, max_seq_len=24, n_layers=2, n_heads=2, dim=32)


def model(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    built = GPT(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def test_greedy_generation_is_that_of_hugging_face() -> None:
    ours = model()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=24, n_layer=2, n_head=2, n_embd=32)).eval()
    theirs.load_state_dict(to_huggingface(CONFIG, ours.state_dict()), strict=False)
    prompts = torch.randint(50, (3, 5))
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=15, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(greedy(ours, prompts, 15), expected[:, 5:])
    one = list(sample(ours, prompts[0], max_new_tokens=15, temperature=0))
    assert one == expected[0, 5:].tolist()


def test_generation_goes_on_past_the_longest_sequence() -> None:
    """The window slides: each token is drawn after the last max_seq_len."""
    ours, tokens = model(), list(range(20))
    drawn = list(sample(ours, torch.tensor(tokens), max_new_tokens=20, temperature=0))
    for token in drawn:
        assert token == int(ours(torch.tensor([tokens[-24:]]))[0, -1].argmax())
        tokens.append(token)


def test_the_end_of_text_ends_it_and_is_not_given_out() -> None:
    drawn = list(sample(model(), torch.tensor([1]), max_new_tokens=30, temperature=0))
    end = drawn[4]
    shorter = list(sample(model(), torch.tensor([1]), max_new_tokens=30, temperature=0, end_of_text=end))
    assert shorter == drawn[: drawn.index(end)]


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    drawn = list(sample(model(), torch.tensor([1]), max_new_tokens=200, temperature=5.0, vocab_size=10))
    assert max(drawn) < 10


logits_lists = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(logits=logits_lists, top_k=st.integers(1, 9), seed=st.integers(0, 1000))
def test_top_k_draws_among_the_k_likeliest(logits: list[float], top_k: int, seed: int) -> None:
    token = draw(torch.tensor(logits), 1.0, top_k, None, torch.Generator().manual_seed(seed))
    kth = sorted(torch.tensor(logits).tolist(), reverse=True)[min(top_k, len(logits)) - 1]
    assert torch.tensor(logits)[token] >= kth


@given(logits=logits_lists, top_p=st.floats(0.01, 1), seed=st.integers(0, 1000))
def test_top_p_draws_among_the_likeliest_that_reach_p(logits: list[float], top_p: float, seed: int) -> None:
    token = draw(torch.tensor(logits), 1.0, None, top_p, torch.Generator().manual_seed(seed))
    probabilities = torch.tensor(logits).softmax(-1)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw(logits, temperature, None, None, generator) for _ in range(4000)]))
    expected = (logits / temperature).softmax(-1)
    assert torch.allclose(counts / 4000, expected, atol=3 * math.sqrt(0.25 / 4000))


def test_drawing_leaves_the_global_generator_alone() -> None:
    ours = model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(sample(ours, torch.tensor([1]), max_new_tokens=5, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.rand(3), expected)


def test_a_stream_gives_the_prompt_and_then_whole_characters() -> None:
    class Writes(torch.nn.Module):
        """Writes one text, byte by byte."""

        config = GPTConfig(vocab_size=257, max_seq_len=64, n_layers=1, n_heads=1, dim=1)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            text = [*"né 日 ok".encode(), 256]
            logits = torch.zeros(1, tokens.shape[1], 257)
            logits[0, -1, text[tokens.shape[1] - 2]] = 1
            return logits

    pieces = list(
        stream(Writes(), ByteTokenizer(), ">>", CPU, max_new_tokens=50, temperature=0, top_k=None, top_p=None, seed=0)
    )
    assert pieces[0] == ">>" and "".join(pieces) == ">>né 日 ok"
    assert "�" not in "".join(pieces) and "日" in pieces


def test_an_unknown_character_in_a_prompt_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="does not know the character 'ü'"):
        list(stream(model(), CharTokenizer("abc"), "aü", CPU, max_new_tokens=1, temperature=1, top_k=None, top_p=None,
                    seed=0))  # fmt: skip
