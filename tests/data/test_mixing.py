"""A mixture keeps its proportions at every position, and any position is reached without a replay of those before."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.mixing import PARTS, Interleaving, Weight, interleave, pattern, shares_at, whole_counts
from cleangpt.errors import UserError

small_weights = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def mixed(weights: list[Weight], total: int = 1000, most: list[int | None] | None = None) -> Interleaving:
    names = [f"s{number}" for number in range(len(weights))]
    return interleave(names, weights, most or [None] * len(weights), total)


def bound(sources: int) -> Fraction:
    """Tijdeman's."""
    return 1 - Fraction(1, max(1, 2 * sources - 2))


@settings(max_examples=30, derandomize=True)
@given(weights=small_weights)
def test_every_source_has_its_share_at_every_position_to_within_less_than_a_sample(weights: list[int]) -> None:
    length = 2 * sum(weights) + 3
    counts = np.zeros(len(weights), dtype=int)
    for position, source in enumerate(mixed([float(weight) for weight in weights]).sources(0, length), start=1):
        counts[source] += 1
        for count, weight in zip(counts.tolist(), weights, strict=True):
            assert abs(count - Fraction(weight * position, sum(weights))) <= bound(len(weights))


@given(weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=5), start=st.integers(0, 10**9), data=st.data())
@settings(max_examples=10, derandomize=True)
def test_every_window_has_the_proportions_of_the_weights(weights: list[float], start: int, data: st.DataObject) -> None:
    """A window's error is that of two positions, and what rounding the shares to parts may add."""
    count = data.draw(st.integers(1, 5000))
    found = np.bincount(mixed(list(weights)).sources(start, count), minlength=len(weights))
    wanted = np.array(weights) / sum(weights) * count
    assert (np.abs(found - wanted) < 2 + count / PARTS).all()


curves = st.lists(
    st.one_of(
        st.integers(1, 9).map(float),
        st.tuples(st.integers(1, 9), st.integers(0, 9)).map(
            lambda ends: ((0.0, float(ends[0])), (1.0, float(ends[1])))
        ),
    ),
    min_size=2,
    max_size=4,
)


@given(weights=curves, most=st.integers(1, 400), start=st.integers(0, 900), count=st.integers(1, 300))
@settings(max_examples=30, derandomize=True)
def test_a_jump_is_a_replay(weights: list[Weight], most: int, start: int, count: int) -> None:
    """With weights that change and a source that ends."""
    interleaving = mixed([*weights, 1.0], 1000, [most, *[None] * len(weights)])
    replayed = np.concatenate([interleaving.sources(position, 1) for position in range(start + count)])
    assert interleaving.sources(start, count).tolist() == replayed[start:].tolist()
    assert interleaving.taken(start).tolist() == np.bincount(replayed[:start], minlength=len(weights) + 1).tolist()


@settings(max_examples=40, derandomize=True)
@given(data=st.data(), sources=st.integers(1, 5), steps=st.integers(1, 30), unit=st.sampled_from([1, 3, 10, PARTS]))
def test_whole_counts_follow_any_growing_quotas(data: st.DataObject, sources: int, steps: int, unit: int) -> None:
    """Steps of any length and shares that jump from step to step, also to nothing."""
    rows = [[0] * sources]
    for _ in range(steps):
        samples = data.draw(st.integers(0, 4))
        cuts = sorted(data.draw(st.lists(st.integers(0, samples * unit), min_size=sources - 1, max_size=sources - 1)))
        rows.append(np.diff([0, *cuts, samples * unit]).tolist())
    quotas = np.cumsum(rows, axis=0)
    counts = whole_counts(quotas, unit)
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(axis=1) * unit == quotas.sum(axis=1)).all()
    assert all(
        abs(int(count) - Fraction(int(quota), unit)) <= bound(sources)
        for count, quota in zip(counts.flat, quotas.flat, strict=True)
    )


def test_a_curriculum_follows_the_integral_of_its_shares() -> None:
    total, weights = 20_000, [((0.0, 1.0), (0.5, 1.0), (1.0, 0.0)), ((0.0, 0.0), (1.0, 3.0)), 0.5]
    interleaving = mixed(weights, total)
    integral = np.cumsum(shares_at(weights, (np.arange(total) + 0.5) / total), axis=0)
    found = np.cumsum(np.eye(3)[interleaving.sources(0, total)], axis=0)
    assert np.abs(found - integral).max() < 3
    assert not (interleaving.sources(total - 100, 100) == 0).any()


@settings(max_examples=30, derandomize=True)
@given(most=st.integers(1, 300), other=st.integers(1, 5))
def test_a_source_ends_at_its_cap_and_the_others_share_out_its_part(most: int, other: int) -> None:
    interleaving = mixed([2.0, 1.0, float(other)], 10**6, [most, None, None])
    end = interleaving.end(0, most)
    assert end is not None
    assert interleaving.taken(end)[0] == most and interleaving.taken(end - 1)[0] == most - 1
    after = interleaving.sources(end, 700)
    assert 0 not in after
    assert abs((after == 1).sum() - 700 / (1 + other)) < 1


def test_all_sources_may_end_one_after_the_other_but_not_before_the_run() -> None:
    assert mixed([3.0, 1.0], 60, [30, 30]).taken(60).tolist() == [30, 30]
    with pytest.raises(UserError, match=r"no source of s0, s1 is left after 60 of 61 samples; allowed: a larger"):
        mixed([3.0, 1.0], 61, [30, 30])


def test_the_length_of_the_run_does_not_change_the_order_of_constant_weights() -> None:
    short, long = (mixed([0.7, 0.2, 0.1], total, [90, None, None]) for total in (500, 10**7))
    assert short.sources(0, 500).tolist() == long.sources(0, 500).tolist()


def test_simple_weights_are_kept_exactly_and_others_in_parts() -> None:
    assert mixed([0.7, 0.2, 0.1]).stretches[0].period == (7, 2, 1)
    assert mixed([1.0, 1.0, 1.0]).stretches[0].period == (1, 1, 1)
    assert sum(mixed([0.1234567, 0.7654321]).stretches[0].period) <= PARTS


def test_a_share_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="source s1 has less than 1 in 20,000 samples"):
        mixed([1.0, 0.00001])


def test_a_pattern_spreads_each_source_out() -> None:
    assert pattern((2, 2)).tolist() in ([0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 1])
    places = np.flatnonzero(pattern((99, 1)) == 1)
    assert 25 < places[0] < 75
