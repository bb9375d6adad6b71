"""The best of n by a judge: its true score is the mean over every choice of n answers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.evaluation.best_of_n import chosen


def by_enumeration(scores: list[int], values: list[float], n: int) -> float:
    """Of equal scores, one at random."""
    found = []
    for choice in itertools.combinations(range(len(scores)), n):
        highest = max(scores[index] for index in choice)
        best = [values[index] for index in choice if scores[index] == highest]
        found.append(math.fsum(best) / len(best))
    return math.fsum(found) / len(found)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-5, 5)), min_size=1, max_size=8), st.data())
def test_it_is_the_mean_over_all_choices(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(pairs)))
    scores, values = (list(column) for column in zip(*pairs, strict=True))
    found = chosen(torch.tensor(scores, dtype=torch.float64), torch.tensor(values, dtype=torch.float64), n)
    assert found == pytest.approx(by_enumeration(scores, values, n), abs=1e-9)


def test_the_best_of_one_is_any_and_the_best_of_all_the_best() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(500, dtype=torch.float64), torch.randn(500, dtype=torch.float64)
    assert chosen(scores, values, 1) == pytest.approx(values.mean().item())
    assert chosen(scores, values, 500) == pytest.approx(values[scores.argmax()].item())
    rising = [chosen(scores, scores, n) for n in (1, 2, 8, 64, 500)]
    assert rising == sorted(rising)
