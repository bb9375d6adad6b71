"""Greedy generation is Hugging Face's, with and without a cache; rows and drafts change nothing."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers import LlamaForCausalLM as TheirLlama

from cleangpt.inference.engine import Token, generate, greedy
from cleangpt.inference.sampling import GREEDY, Sampling, SeededSampler, distribution
from cleangpt.inference.speculative import speculate
from cleangpt.interchange.huggingface import mapping_of
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from tests.scripted import Scripted

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=50, max_seq_len=24, n_layers=2, n_heads=2, dim=32)
LLAMA: dict[str, Any] = {
    "vocab_size": 50, "max_seq_len": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "dim": 32, "hidden_dim": 48
}  # fmt: skip
KINDS = {
    "gpt2": (CONFIG, GPT2LMHeadModel),
    "llama": (LlamaConfig(**LLAMA), TheirLlama),
    "mistral": (LlamaConfig(**LLAMA, sliding_window=4), MistralForCausalLM),
    "qwen3": (LlamaConfig(**LLAMA, qk_norm=True), Qwen3ForCausalLM),
    "mixtral": (LlamaConfig(**LLAMA, n_experts=4), MixtralForCausalLM),
}


def model(config: Any = CONFIG, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    built = build_model(config)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


def theirs_of(ours: nn.Module, config: Any, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Hugging Face's model with the same weights."""
    mapping = mapping_of(config)
    entries = mapping.config_to_huggingface(config)
    built = kind(kind.config_class(**{name: value for name, value in entries.items() if name != "architectures"}))
    missing, strange = built.load_state_dict(mapping.to_huggingface(config, ours.state_dict()), strict=False)
    assert not strange and set(missing) <= {"lm_head.weight"}
    built.tie_weights()
    return built.eval()


def expected_tokens(theirs: PreTrainedModel, prompts: Tensor, count: int) -> Tensor:
    return theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )[:, prompts.shape[1] :]  # fmt: skip


def ids(drawn: Any, row: int = 0) -> list[int]:
    return [tokens[row].id for tokens in drawn if tokens[row] is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_that_of_hugging_face_with_and_without_a_cache(kind: str) -> None:
    config, their_kind = KINDS[kind]
    ours, prompts = model(config), torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1))
    if kind == "mixtral":  # Hugging Face keeps experts stacked in memory, and apart in files only
        expected = greedy(ours, prompts, 15, cached=False)
    else:
        expected = expected_tokens(theirs_of(ours, config, their_kind), prompts, 15)
    assert torch.equal(greedy(ours, prompts, 15), expected)
    assert torch.equal(greedy(ours, prompts, 15, cached=False), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, seed=3, repetition_penalty=1.3)])
def test_each_of_several_uneven_rows_is_what_it_would_be_alone(kind: str, sampling: Sampling) -> None:
    """Past the longest sequence too, which the rows reach one after the other."""
    ours, prompts = model(KINDS[kind][0]), [[1], list(range(20)), [4, 2, 9, 9, 1, 3]]
    for cached in (True, False):
        together = list(generate(ours, prompts, CPU, max_new_tokens=40, sampling=sampling, cached=cached))
        for row, prompt in enumerate(prompts):
            one = Sampling(**{**vars(sampling), "seed": sampling.seed + row})
            alone = ids(generate(ours, [prompt], CPU, max_new_tokens=40, sampling=one, cached=not cached))
            assert ids(together, row) == alone


def test_a_text_that_is_too_long_goes_on_after_its_last_half() -> None:
    ours, tokens, window = model(), list(range(20)), list(range(20))
    for token in ids(generate(ours, [tokens], CPU, max_new_tokens=40)):
        if len(window) > 24:
            window = window[-12:]
        assert token == int(ours(torch.tensor([window]))[0, -1].argmax())
        window.append(token)


def test_the_end_of_text_ends_its_row_alone_and_is_not_given_out() -> None:
    ours, prompts = model(), [[1], [2]]
    whole = list(generate(ours, prompts, CPU, max_new_tokens=30))
    end = ids(whole, 0)[4]
    ended = list(generate(ours, prompts, CPU, max_new_tokens=30, ends={end}))
    lengths = [[*ids(whole, row), end].index(end) for row in (0, 1)]
    assert lengths[0] != lengths[1]
    for row, length in enumerate(lengths):
        assert ids(ended, row) == ids(whole, row)[:length]


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    drawn = generate(model(), [[1]], CPU, max_new_tokens=200, vocab_size=10, sampling=Sampling(temperature=5.0))
    assert max(ids(drawn)) < 10


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    """Whatever the temperature and the restrictions with which the token was drawn."""
    ours, prompt = model(), [3, 1, 4]
    sampling = Sampling(temperature=2.0, top_k=5)
    drawn = [row[0] for row in generate(ours, [prompt], CPU, max_new_tokens=15, sampling=sampling)]
    tokens = prompt + [token.id for token in drawn if token]
    expected = ours(torch.tensor([tokens]))[0].log_softmax(-1).detach()
    for place, token in enumerate(drawn, start=2):
        assert token is not None
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)


class Table(Scripted):
    """Logits that depend on the last token alone; it has no cache."""

    def __init__(self, seed: int) -> None:
        super().__init__(4, max_seq_len=16)
        self.table = 1.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_a_model_without_a_cache_is_read_anew_each_time() -> None:
    tokens = ids(generate(Table(1), [[0]], CPU, max_new_tokens=40))
    for before, after in zip([0, *tokens], tokens, strict=False):
        assert after == int(Table(1).table[before].argmax())


def spoken(large: nn.Module, small: nn.Module, prompt: Sequence[int], **options: Any) -> list[Token]:
    return list(speculate(large, small, prompt, CPU, **options))


@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
@pytest.mark.parametrize("same", [True, False], ids=["perfect draft", "bad draft"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_a_draft_does_not_change_greedy_tokens(kind: str, same: bool, draft_tokens: int) -> None:
    """Nor their log-probabilities, nor past the longest sequence of either model."""
    large = model(KINDS[kind][0])
    small = large if same else model(GPTConfig(vocab_size=50, max_seq_len=16, n_layers=1, n_heads=2, dim=16), seed=9)
    expected = [row[0] for row in generate(large, [[7, 8]], CPU, max_new_tokens=60)]
    drawn = spoken(large, small, [7, 8], max_new_tokens=60, draft_tokens=draft_tokens)
    assert [token.id for token in drawn] == [token.id for token in expected if token]
    for ours, theirs in zip(drawn, expected, strict=True):
        assert theirs is not None and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_perfect_draft_saves_passes() -> None:
    large, passes = model(), Counter[str]()
    large.register_forward_hook(lambda *_: passes.update(["passes"]))
    spoken(large, model(), [7, 8], max_new_tokens=20, draft_tokens=4)
    assert passes["passes"] == 4


def test_drafted_tokens_are_distributed_as_those_of_the_larger_model() -> None:
    """Two tokens after token 0, from tables of which the exact distribution is known."""
    large, small = Table(1), Table(2)
    for sampling in (Sampling(temperature=1.3, top_k=3), Sampling(repetition_penalty=1.7)):
        penalised = sampling.repetition_penalty != 1
        counts: Counter[tuple[int, ...]] = Counter()
        for seed in range(3000):
            one = Sampling(**{**vars(sampling), "seed": seed})
            counts[tuple(token.id for token in spoken(large, small, [0], max_new_tokens=2, sampling=one))] += 1
        first = distribution(large.table[:1], sampling, torch.tensor([[True, False, False, False]]) & penalised)
        for token in range(4):
            context = torch.zeros(1, 4, dtype=torch.bool)
            context[0, [0, token]] = penalised
            second = distribution(large.table[token : token + 1], sampling, context)
            for after in range(4):
                expected = float(first[0, token] * second[0, after])
                spread = (expected * (1 - expected) / 3000) ** 0.5
                assert counts[token, after] / 3000 == pytest.approx(expected, abs=4 * spread + 1e-9)


def test_a_drafted_text_ends_at_its_end() -> None:
    large = model()
    whole = [token.id for token in spoken(large, large, [1], max_new_tokens=30)]
    ended = spoken(large, large, [1], max_new_tokens=30, ends={whole[4]})
    assert [token.id for token in ended] == whole[: whole.index(whole[4])]


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_tokens() -> None:
    ours, prompts = model(KINDS["mistral"][0]), [[1, 2, 3], [4]]
    plain, compiled = (
        [
            [token.id if token else None for token in row]
            for row in generate(ours, prompts, CPU, max_new_tokens=40, compiled=compiled)
        ]
        for compiled in (False, True)
    )
    assert plain == compiled


def test_draws_of_a_row_follow_its_seed() -> None:
    sampling = Sampling(seed=11)
    one = ids(generate(model(), [[1]], CPU, max_new_tokens=10, sampling=sampling))
    assert one == ids(generate(model(), [[1]], CPU, max_new_tokens=10, sampling=sampling))
    assert one != ids(generate(model(), [[1]], CPU, max_new_tokens=10, sampling=Sampling(seed=12)))
    assert SeededSampler([11]).uniform() == SeededSampler([11]).uniform()
