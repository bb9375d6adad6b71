"""The steps of an episode as tokens: observation, separator, action, each observation in one fixed order of its parts.

Next to every token stands its *place*, which the model embeds: the place among the observation's tokens, or that it
belongs to an action (Reed et al. 2022, section 2.1; all tokens of actions share one place). The loss is on actions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.modalities import Box, Space, TokenRanges, Values

NO_PLACE, ACTION, HIDDEN, FIRST_PLACE = 0, 1, 2, 3
"""Places: of text, separators and padding; of actions; of actions that the model cannot see; of observations, from the
first of their tokens on."""
RETURN = Box(())
"""The space of a return, compressed by the μ-law."""


class Steps(NamedTuple):
    """Steps as tokens; all three are `(steps, tokens of a step)`."""

    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    mask: NDArray[np.uint8]
    """1 where the loss counts: the tokens of actions that are to be imitated."""

    def part(self, start: int, stop: int) -> "Steps":
        """Some of the steps."""
        return Steps(self.tokens[start:stop], self.places[start:stop], self.mask[start:stop])

    def followed_by(self, tokens: "Steps") -> "Steps":
        """The same steps, each with more tokens."""
        return Steps(
            np.concatenate([self.tokens, tokens.tokens], axis=1),
            np.concatenate([self.places, tokens.places], axis=1),
            np.concatenate([self.mask, tokens.mask], axis=1),
        )


@dataclass(frozen=True)
class Timesteps:
    """How the steps of a task become tokens."""

    ranges: TokenRanges
    observation: Space
    action: Space
    returns: bool = False
    """Whether an observation begins with the return that is to come (Chen et al. 2021, "Decision transformer")."""

    @property
    def observation_size(self) -> int:
        """Tokens before a step's action."""
        return self.returns + self.observation.size + (self.ranges.separator is not None)

    @property
    def size(self) -> int:
        """Tokens of a step."""
        return self.observation_size + self.action.size

    def observe(self, observations: Values, returns: NDArray[np.float64] | None = None) -> Steps:
        """What is read before acting, of a batch of observations; with `returns` `(batch,)` that are to come.

        Raises:
            UserError: an observation is not of the task's space.
        """
        parts = [self.observation.encode(observations, self.ranges)]
        rows = len(parts[0])
        if self.returns:
            assert returns is not None
            parts.insert(0, RETURN.encode(returns, self.ranges))
        seen = np.concatenate(parts, axis=1)
        places = np.tile(FIRST_PLACE + np.arange(seen.shape[1]), (rows, 1))
        if self.ranges.separator is not None:
            seen = np.concatenate([seen, np.full((rows, 1), self.ranges.separator)], axis=1)
            places = np.concatenate([places, np.full((rows, 1), NO_PLACE)], axis=1)
        return Steps(seen, places, np.zeros(seen.shape, np.uint8))

    def encode(
        self, observations: Values, actions: Values, learned: NDArray[np.bool_],
        returns: NDArray[np.float64] | None = None, hidden: bool = False,
    ) -> Steps:  # fmt: skip
        """Whole steps.

        Args:
            observations: of each step.
            actions: of each step.
            learned: whether a step's action is to be imitated `(steps,)`; the others are read and do not count.
            returns: to come `(steps,)`.
            hidden: whether the model may see the actions.
        """
        seen = self.observe(observations, returns)
        acted = self.action.encode(actions, self.ranges, action=True)
        counts = np.repeat(np.asarray(learned, np.uint8)[:, None], acted.shape[1], axis=1)
        return seen.followed_by(Steps(acted, self.action_places(acted.shape, hidden), counts))

    @staticmethod
    def action_places(shape: tuple[int, ...], hidden: bool) -> NDArray[np.int64]:
        """The places of action tokens."""
        return np.full(shape, HIDDEN if hidden else ACTION)


def returns_to_go(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of the rewards from each step on `(steps,)`."""
    return np.cumsum(rewards[::-1])[::-1]
