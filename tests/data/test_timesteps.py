"""Steps of episodes as tokens, their places, and what counts in the loss."""

import numpy as np
import pytest

from cleangpt.data.modalities import Box, Discrete, Modalities, TokenRanges
from cleangpt.data.timesteps import ACTION, FIRST_PLACE, HIDDEN, NO_PLACE, Timesteps, returns_to_go


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
