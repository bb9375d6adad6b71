"""Gymnasium's small worlds of whole numbers, whose tables say what follows from what, and their expert."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.errors import require

DISCOUNT = 0.999
"""Below 1, so that a goal is worth the more, the sooner it is reached."""
CLIFF_STEPS = 200
"""Cliffs have no time limit of their own, and a policy that walks in circles would never come to an end."""


def make_cliff(name: str, render_mode: str | None, **fields: Any) -> Any:
    """A simulation of a cliff; `fields` are those of `gymnasium.make`."""
    return require("gymnasium").make(name, render_mode=render_mode, **{"max_episode_steps": CLIFF_STEPS} | fields)


def planned(simulation: Any, observation: Any) -> int:
    """The best action, by value iteration over the simulation's table."""
    return int(_plan(simulation.unwrapped)[observation])


@lru_cache(maxsize=8)
def _plan(world: Any) -> NDArray[np.int64]:
    """The best action in each state `(states,)` of a world with a table `P`: by state and action, pairs of what may
    follow: probability, state, reward, whether the episode ends."""
    table = world.P
    width = max(len(outcomes) for actions in table.values() for outcomes in actions.values())
    padded = [[[*table[state][action], *[(0.0, 0, 0.0, True)] * (width - len(table[state][action]))]
               for action in sorted(table[state])] for state in sorted(table)]  # fmt: skip
    chance, following, reward, ends = np.moveaxis(np.array(padded, float), -1, 0)
    gain, goes_on = (chance * reward).sum(-1), DISCOUNT * chance * (1 - ends)
    value, change = np.zeros(len(padded)), 1.0
    while change > 1e-9:
        action_values = gain + (goes_on * value[following.astype(int)]).sum(-1)
        change = float(np.abs(action_values.max(-1) - value).max())
        value = action_values.max(-1)
    return np.asarray(action_values.argmax(-1))
