"""Steps of episodes as tokens, their places, and what counts in the loss."""

from typing import Any

import numpy as np
import pytest

from cleangpt.data.modalities import Box, Dict, Discrete, Image, Modalities, TokenRanges, mu_law
from cleangpt.data.timesteps import ACTION, FIRST_PLACE, HIDDEN, NO_PLACE, Timesteps, returns_to_go
from cleangpt.errors import UserError


@pytest.mark.parametrize("separator", ["own", "none"])
@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_is_the_observation_a_separator_and_the_action(separator: str, returns: bool, hidden: bool) -> None:
    ranges = TokenRanges(10, Modalities(separator=separator))  # type: ignore[arg-type]
    steps = Timesteps(ranges, Box((3,)), Box((2,), (-1.0, -1.0), (1.0, 1.0)), returns)
    seen = np.array([[0.1, -2.0, 7.0], [1.0, 0.0, 300.0]])
    done = np.array([[0.5, -0.5], [1.0, -1.0]])
    coming, learned = np.array([20.0, -3.0]), np.array([True, False])
    found = steps.encode(seen, done, learned, coming, hidden)
    for row in range(2):
        tokens, places, mask = list[int](), list[int](), list[int]()
        values = [coming[row], *seen[row]] if returns else list(seen[row])
        for place, value in enumerate(values):
            tokens.append(int(Box((1,)).encode(np.array([[value]]), ranges)[0, 0]))
            places.append(FIRST_PLACE + place)
            mask.append(0)
        if separator == "own":
            tokens, places, mask = [*tokens, ranges.separator], [*places, NO_PLACE], [*mask, 0]
        for value in done[row]:
            tokens.append(10 + min(int((value + 1) / 2 * 1024), 1023))
            places.append(HIDDEN if hidden else ACTION)
            mask.append(int(learned[row]))
        assert [column[row].tolist() for column in (found.tokens, found.places, found.mask)] == [tokens, places, mask]
        assert len(tokens) == steps.size
    before = steps.observe(seen, coming)
    assert np.array_equal(found.tokens[:, : steps.observation_size], before.tokens)
    assert np.array_equal(found.places[:, : steps.observation_size], before.places)


def test_a_single_action_has_a_single_token() -> None:
    steps = Timesteps(TokenRanges(10), Discrete((4,)), Discrete((3,)))
    assert steps.size == 3
    assert steps.encode(np.array([2]), np.array([1]), np.array([True])).mask.tolist() == [[0, 0, 1]]


def test_the_return_to_go_is_the_sum_of_what_is_left() -> None:
    rewards = np.array([1.0, -2.0, 0.5, 4.0])
    assert returns_to_go(rewards).tolist() == [sum(rewards[step:]) for step in range(4)]


SEEN = Dict((("view", Image(2, 2, 4)), ("speed", Box((2,))), ("gear", Discrete((3,))), ("above", Image(2, 2, 4))))
"""Parts of an observation, in no order."""


def observed(rows: int) -> dict[str, Any]:
    """A batch of observations that differ."""
    pixels = np.arange(rows * 12).reshape(rows, 2, 2, 3).astype(np.uint8)
    speeds = np.arange(rows * 2).reshape(rows, 2) / 10.0
    return {"view": pixels, "above": pixels + 100, "speed": speeds, "gear": np.arange(rows) % 3}


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("vector", [0, 1, 5])
def test_images_come_first_then_vectors_or_the_numbers_by_their_keys(vector: int, returns: bool) -> None:
    ranges = TokenRanges(10, Modalities(vector=vector))
    steps, seen = Timesteps(ranges, SEEN, Discrete((2,)), returns), observed(3)
    found = steps.encode(seen, np.array([0, 1, 1]), np.ones(3, bool), np.array([3.0, 2.0, 1.0]))
    gear, first, vectors = ranges.first_choice + seen["gear"], int(returns), {0: 0, 1: 2, 5: 1}[vector]
    numbers = Box((2,)).encode(seen["speed"], ranges)
    assert found.tokens.shape[1] == steps.size == first + 8 + ((vectors + 1) if vector else 3) + 2
    assert (found.tokens[:, first + 8 : first + 8 + vectors] == 0).all()
    assert np.array_equal(found.tokens[:, first + 8 + vectors : -2], gear[:, None] if vector else np.c_[gear, numbers])
    assert found.places[0, :-2].tolist() == list(range(FIRST_PLACE, FIRST_PLACE + steps.size - 2))
    assert np.array_equal(found.records["images"], np.stack([seen["above"], seen["view"]], axis=1))
    assert found.ends["images"].tolist() == [first + 4, first + 8]
    assert set(found.records) == set(steps.records) == ({"images", "vectors"} if vector else {"images"})
    if vector:
        expected = np.pad(mu_law(seen["speed"]), ((0, 0), (0, 3 if vector == 5 else 0)))
        assert np.allclose(found.records["vectors"].reshape(3, -1), expected)
        assert found.records["vectors"].shape == (3, vectors, *steps.records["vectors"].shape)
        assert found.ends["vectors"].tolist() == [first + 8 + number for number in range(1, vectors + 1)]
    placed = found.part(1, 3).placed()["images"]
    assert placed.ends.tolist() == [first + 4, first + 8, steps.size + first + 4, steps.size + first + 8]
    assert np.array_equal(placed.values[2], seen["above"][2])


def test_a_vector_of_something_that_is_no_number_is_refused() -> None:
    steps = Timesteps(TokenRanges(10, Modalities(vector=2)), Box((2,)), Discrete((2,)))
    with pytest.raises(UserError, match="NaN"):
        steps.observe(np.array([[np.nan, 1.0]]))


def test_pictures_are_no_actions() -> None:
    steps = Timesteps(TokenRanges(10), Box((1,)), Image(2, 2, 4))
    with pytest.raises(UserError, match="a space of actions has pictures"):
        steps.encode(np.zeros((1, 1)), np.zeros((1, 2, 2, 3), np.uint8), np.ones(1, bool))


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 1), (4, 4, 3)])
def test_pictures_become_one_size(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    stacked = Image(4, 4, 1).stack(list(pixels))
    assert stacked.shape == (2, 4, 4, 3) and stacked.dtype == np.uint8
    if shape == (4, 4, 3):
        assert np.array_equal(stacked, pixels)
    else:
        assert abs(stacked.mean() - pixels.mean()) < 15
    assert shape[2] == 3 or (stacked == stacked[..., :1]).all()


def test_numbers_of_a_vector_are_clipped_as_those_of_bins_are() -> None:
    steps = Timesteps(TokenRanges(10, Modalities(vector=2)), Box((2,)), Discrete((2,)))
    assert steps.observe(np.array([[1e9, -1e9]])).records["vectors"].tolist() == [[[1.0, -1.0]]]
