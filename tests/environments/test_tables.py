"""The expert of worlds with tables: what it plans, and what it reaches."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.environments.experts import find_expert, record
from cleangpt.environments.gymnasium import make
from cleangpt.environments.tables import planned


class World:
    """In state 0 one may take a 1 at once, wait, or go to state 1, where one may gamble, or wait for more."""

    P: Any = {  # noqa: RUF012
        0: {0: [(1.0, 0, 1.0, True)], 1: [(1.0, 0, 0.0, False)], 2: [(1.0, 1, 0.0, False)]},
        1: {0: [(0.4, 0, 3.0, True), (0.6, 0, 0.0, True)], 1: [(0.9, 1, 0.0, False), (0.1, 0, 1.4, True)],
            2: [(1.0, 0, 0.0, False)]},
    }  # fmt: skip


def test_the_best_action_is_that_whose_rewards_add_up_to_most() -> None:
    simulation = SimpleNamespace(unwrapped=World())
    # 1.4, late, is more than the 1.2 that the gamble is worth, and than the 1 at once.
    assert [planned(simulation, state) for state in (0, 1)] == [2, 1]


@pytest.mark.parametrize(
    ("name", "episodes", "least"),
    [("FrozenLake-v1", 100, 0.65), ("Taxi-v4", 20, 7.0), ("CliffWalking-v1", 1, -13.0)],
)
def test_it_reaches_the_goal(name: str, episodes: int, least: float) -> None:
    simulation = make(name)
    returns = [sum(record(simulation, find_expert(name), seed)[2]) for seed in range(episodes)]
    assert np.mean(returns) >= least


def test_a_walk_beside_the_cliff_comes_to_an_end() -> None:
    assert make("CliffWalking-v1").spec.max_episode_steps == 200
    assert make("CliffWalking-v1", (("max_episode_steps", 20),)).spec.max_episode_steps == 20


def test_whole_numbers_are_observed_as_one_token() -> None:
    corpus = Demonstrations(env="Taxi-v4", played=2)
    observation, action = corpus.spaces()
    assert (observation.size, action.size) == (1, 1)
    episode = next(corpus.episodes(0))
    assert episode.observations.shape == (len(episode.rewards) + 1,) and episode.observations.min() >= 0
