"""Distributions are those of Hugging Face's processors, and samples follow them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cleangpt.errors import UserError
from cleangpt.inference.sampling import Sampling, distribution, row_seed, sample, uniform

THEIRS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
fields = st.fixed_dictionaries(
    {"temperature": st.floats(0.2, 3.0)},
    optional={"top_k": st.integers(1, 12), "top_p": st.floats(0.05, 0.99), "min_p": st.floats(0.01, 0.99)},
)


@given(fields=fields, penalty=st.sampled_from([1.0, 0.7, 1.5]), seed=st.integers(0, 1000))
def test_the_distribution_is_that_of_hugging_face(fields: dict[str, Any], penalty: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 10, generator=generator)
    tokens = torch.randint(10, (3, 4), generator=generator)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors += [THEIRS[name](fields[name]) for name in THEIRS if name in fields]
    expected = processors(tokens, logits.clone()).softmax(dim=-1)
    context = torch.zeros(3, 10, dtype=torch.bool).scatter_(1, tokens, True)
    ours = distribution(logits, Sampling(**fields, repetition_penalty=penalty), context if penalty != 1 else None)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_temperature_0_leaves_the_most_likely_token_alone() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]])
    assert distribution(logits, Sampling(temperature=0)).tolist() == [[0, 1, 0], [1, 0, 0]]


LOGITS = torch.tensor([[4.0, 5.0, 3.0, -2.0], [-1.0, -3.0, 0.5, -0.5]])
SEEN = torch.tensor([[False, True, False, True], [True, False, True, False]])
EXTREMES: list[dict[str, float]] = [
    *({name: value} for name in ("top_p", "min_p") for value in (5e-324, 1e-45, 1e-38, 1e-7, 1.0)),
    *({"temperature": value} for value in (5e-324, 1e-45, 1e-38, 1e-37, 1e-20, 1e-6, 1e38, 1e39, 1.7e308)),
    *({"repetition_penalty": value} for value in (5e-324, 1e-45, 1e-38, 1e38, 1e39, 1.7e308)),
    {"temperature": 1e-4, "repetition_penalty": 1e38, "top_p": 1e-45, "min_p": 1.0},
]


@pytest.mark.parametrize("fields", EXTREMES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0])
def test_every_setting_within_its_range_gives_a_distribution(fields: dict[str, Any], scale: float) -> None:
    probabilities = distribution(LOGITS * scale, Sampling(**fields), SEEN)
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-45, 1e-38, 1e-37, 1e-20, 9e-6])
def test_a_very_small_temperature_is_greedy(temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    assert sampling.greedy and distribution(LOGITS, sampling).argmax(-1).tolist() == [1, 2]
    ties = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert distribution(ties, sampling).tolist() == distribution(ties, Sampling(temperature=0)).tolist()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_p": 5e-324}, [1, 2]),
        ({"min_p": 1.0}, [1, 2]),
        ({"temperature": 1e-3}, [1, 2]),
        ({"repetition_penalty": 1e300}, [0, 2]),
        ({"repetition_penalty": 1e-300}, [1, 2]),
    ],
    ids=str,
)
def test_extremes_take_the_token_that_their_limit_takes(fields: dict[str, Any], expected: list[int]) -> None:
    assert distribution(LOGITS, Sampling(**fields), SEEN).argmax(-1).tolist() == expected


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 0.99999, 0.9999999, 1.0])
def test_the_nucleus_of_a_large_vocabulary_is_no_smaller_than_it_must_be(top_p: float) -> None:
    """As float64 has it; the rounding of a sum in float32 would leave out a quarter of the vocabulary at top_p 1."""
    logits = 3 * torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0))
    kept = distribution(logits, Sampling(top_p=top_p))[0] > 0
    inside = logits.double().softmax(dim=-1)[0][kept]
    rounding = torch.finfo(torch.float32).eps
    assert inside.sum() >= top_p - rounding
    assert inside.sum() - inside.min() < top_p + rounding
    assert kept.all() or top_p < 1


@pytest.mark.parametrize(
    ("probabilities", "top_p", "size"),
    [([0.3, 0.1, 0.1, 0.5], 0.8, 2), ([0.25] * 4, 0.75, 3), ([0.4, 0.3, 0.2, 0.1], 0.9, 3), ([0.7, 0.2, 0.1], 0.9, 2)],
)
def test_tokens_that_sum_to_exactly_top_p_are_enough(probabilities: list[float], top_p: float, size: int) -> None:
    logits = torch.tensor([probabilities]).log()
    assert int((distribution(logits, Sampling(top_p=top_p)) > 0).sum()) == size


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.5, 1e30])
def test_logits_that_are_not_finite_are_told_rather_than_sampled_from(value: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, value, 1.0]])
    with pytest.raises(UserError, match="logits are not finite"):
        sample(distribution(logits, Sampling(temperature=temperature)), torch.tensor([0.5]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    expected = distribution(torch.tensor([[1.0, 0.0, -1.0]]), Sampling(temperature=temperature))
    draws = uniform([row_seed(seed) for seed in range(4000)], [0] * 4000)
    counts = sample(expected.expand(4000, -1), draws).bincount(minlength=3)
    assert torch.allclose(counts / 4000, expected[0], atol=3 * math.sqrt(0.25 / 4000))


@given(seed=st.integers(0, 10**6), possible=st.sets(st.integers(0, 9), min_size=1))
def test_a_token_of_probability_0_is_never_sampled(seed: int, possible: set[int]) -> None:
    probabilities = torch.zeros(1, 10)
    probabilities[0, list(possible)] = 0.1
    assert int(sample(probabilities, uniform([row_seed(seed)], [0]))) in possible


def test_rows_sample_what_they_would_alone_and_the_global_generator_stays() -> None:
    probabilities = torch.rand(5, 100)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seeds = [row_seed(seed) for seed in range(5)]
    for index in range(3):
        sampled = sample(probabilities, uniform(seeds, [index] * 5)).tolist()
        rows = zip(seeds, probabilities, strict=True)
        assert sampled == [int(sample(row[None], uniform([seed], [index]))) for seed, row in rows]
    assert torch.equal(torch.rand(3), expected)


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    """Over the indices of one row, and over rows with neighboring seeds; 32 bits, so never 1."""
    one = uniform([row_seed(3)] * 4000, list(range(4000)))
    many = uniform([row_seed(seed) for seed in range(4000)], [7] * 4000)
    for draws in (one, many):
        assert float(draws.min()) >= 0 and float(draws.max()) < 1
        counts = (draws * 20).long().bincount(minlength=20)
        assert float(((counts - 200).double().square() / 200).sum()) < 43.8  # chi-squared, 19 degrees, p = 0.001
        assert abs(float(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1])) < 0.06
