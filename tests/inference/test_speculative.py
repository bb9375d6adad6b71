"""A draft model changes neither greedy tokens nor the distribution of sampled ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cleangpt.inference.engine import Engine, Token
from cleangpt.inference.sampling import Sampling, distribution
from cleangpt.inference.speculative import speculate
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from tests.inference.test_engine import CPU, KINDS, model
from tests.scripted import Bigrams


def speculated(large: LanguageModel, small: LanguageModel, prompt: Sequence[int], **options: Any) -> list[Token]:
    return list(speculate(large, small, prompt, CPU, **options))


@pytest.mark.default(1)
@pytest.mark.parametrize("draft_tokens", [3, 1, 7])
@pytest.mark.parametrize("same", [True, False], ids=["perfect draft", "bad draft"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_a_draft_does_not_change_greedy_tokens(kind: str, same: bool, draft_tokens: int) -> None:
    """Nor their log-probabilities, nor past the longest sequence of either model."""
    large = model(KINDS[kind][0])
    small = large if same else model(GPTConfig(vocab_size=50, max_seq_len=16, n_layers=1, n_heads=2, dim=16), seed=9)
    (expected,) = Engine(large, CPU).generate([[7, 8]], max_new_tokens=60)
    generated = speculated(large, small, [7, 8], max_new_tokens=60, draft_tokens=draft_tokens)
    assert [token.id for token in generated] == [token.id for token in expected.tokens]
    for ours, theirs in zip(generated, expected.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_perfect_draft_saves_passes() -> None:
    large, passes = model(), Counter[str]()
    large.register_forward_hook(lambda *_: passes.update(["passes"]))
    speculated(large, model(), [7, 8], max_new_tokens=20, draft_tokens=4)
    assert passes["passes"] == 4


@pytest.mark.slow
def test_drafted_tokens_are_distributed_as_those_of_the_larger_model() -> None:
    """Two tokens after token 0, from tables of which the exact distribution is known."""
    large, small = Bigrams(1), Bigrams(2)
    for sampling in (Sampling(temperature=1.3, top_k=3), Sampling(repetition_penalty=1.7)):
        penalised = sampling.repetition_penalty != 1
        counts: Counter[tuple[int, ...]] = Counter()
        for seed in range(3000):
            one = Sampling(**{**vars(sampling), "seed": seed})
            counts[tuple(token.id for token in speculated(large, small, [0], max_new_tokens=2, sampling=one))] += 1
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
    complete = [token.id for token in speculated(large, large, [1], max_new_tokens=30)]
    ended = speculated(large, large, [1], max_new_tokens=30, stop_ids={complete[4]})
    assert [token.id for token in ended] == complete[: complete.index(complete[4])]
