"""The order of samples is a permutation of them, computed at any position, fresh every epoch."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.shuffle import Order, mix, permute

keys = st.integers(0, 2**64 - 1)
RECORDED = [340, 725, 757, 77, 82, 702, 770, 928]


@given(n=st.integers(1, 3000), key=keys)
def test_every_key_permutes_every_range(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@given(n=st.integers(1, 10**12), key=keys, data=st.data())
def test_large_ranges_are_hit_within_bounds_and_without_collisions(n: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=200)), dtype=np.int64)
    images = permute(positions, n, key)
    assert ((images >= 0) & (images < n)).all()
    assert len(set(images.tolist())) == len(positions)


@given(n=st.integers(2, 10**9), key=keys, data=st.data())
def test_a_position_costs_no_look_at_the_others(n: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), dtype=np.int64)
    together = permute(positions, n, key)
    assert together.tolist() == [int(permute(positions[i : i + 1], n, key)[0]) for i in range(len(positions))]


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_sizes_out_of_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to"):
        permute(np.array([0]), n, 1)


def test_positions_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="7 of 7"):
        permute(np.array([7]), 7, 1)


def test_images_look_drawn_at_random() -> None:
    """Over many keys, where position 0 of 10 goes is uniform: chi-square with 9 degrees, 99.9 % quantile 27.9."""
    draws = np.array([permute(np.array([0]), 10, mix(key))[0] for key in range(5000)])
    counts = np.bincount(draws, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9


def is_odd(order: list[int]) -> bool:
    """Whether a permutation takes an odd number of exchanges, counted by making them."""
    order, exchanges = list(order), 0
    for place in range(len(order)):
        while (at := order[place]) != place:
            order[place], order[at] = order[at], at
            exchanges += 1
    return exchanges % 2 == 1


@pytest.mark.default(4)
@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 9, 10, 12, 15, 16, 30, 32, 63, 64])
def test_orders_of_few_samples_are_as_often_odd_as_even(n: int) -> None:
    odd = sum(is_odd(permute(np.arange(n), n, key).tolist()) for key in range(1000))
    assert abs(odd - 500) < 5 * math.sqrt(1000 / 4)


@pytest.mark.parametrize(("n", "quantile"), [(2, 10.8), (3, 20.5), (4, 49.7)])
def test_every_order_of_few_samples_is_equally_likely(n: int, quantile: float) -> None:
    """Chi-square with n! - 1 degrees of freedom, 99.9 % quantile."""
    drawn = Counter(tuple(permute(np.arange(n), n, key).tolist()) for key in range(3000))
    expected = 3000 / math.factorial(n)
    assert sum((drawn[order] - expected) ** 2 / expected for order in itertools.permutations(range(n))) < quantile


def test_the_order_of_many_samples_is_that_of_earlier_versions() -> None:
    """Runs resume in the order in which they began."""
    assert permute(np.arange(8), 1000, 7).tolist() == RECORDED


def test_neighbours_are_scattered() -> None:
    """The mean distance of two uniform points of a line is a third of it."""
    n = 100_000
    images = permute(np.arange(n), n, 42)
    assert abs(np.abs(np.diff(images)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.02


@given(n=st.integers(1, 400), seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 4))
def test_each_epoch_has_every_sample_once(n: int, seed: int, epochs: int) -> None:
    epoch, sample = Order(n, seed).at(np.arange(n * epochs))
    for number in range(epochs):
        assert sorted(sample[epoch == number]) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    order = Order(1000, 1)
    _, two_epochs = order.at(np.arange(2000))
    _, other_seed = Order(1000, 2).at(np.arange(1000))
    assert (two_epochs[:1000] != two_epochs[1000:]).mean() > 0.9
    assert (two_epochs[:1000] != other_seed).mean() > 0.9


@settings(max_examples=30)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_positions_are_the_inverse_of_the_order(n: int, seed: int, epoch: int) -> None:
    order = Order(n, seed)
    places = np.arange(epoch * n, (epoch + 1) * n)
    _, samples = order.at(places)
    assert order.positions(samples, epoch).tolist() == places.tolist()


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), seq_len=st.integers(1, 10**5))
def test_offsets_stay_within_a_window(seed: int, epoch: int, seq_len: int) -> None:
    assert 0 <= Order(10, seed).offset(epoch, seq_len) < seq_len


def test_offsets_change_with_the_epoch() -> None:
    assert len({Order(10, 3).offset(epoch, 1024) for epoch in range(50)}) > 40
