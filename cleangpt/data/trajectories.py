"""An episode that has been played: what was seen, done and earned."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.modalities import Values, take


@dataclass
class Trajectory:
    """The steps of an episode, T of them."""

    observations: Values
    """One before each action, `(T, …)`; one more, after the last action, may follow."""
    actions: Values
    """`(T, …)`."""
    rewards: NDArray[np.float64]
    """`(T,)`."""
    learned: NDArray[np.bool_]
    """Whether each action is to be imitated `(T,)`; noise is not, which made the expert show how to recover."""
    terminated: bool = False
    """Whether the episode came to its end; if not, a limit cut it off."""
    text: str = ""
    """What the policy reads before it, such as what it has to do."""

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total(self) -> float:
        """The return."""
        return float(self.rewards.sum())

    def steps(self, start: int, stop: int) -> tuple[Values, Values, NDArray[np.bool_]]:
        """Observations, actions, and whether these are to be imitated, of some steps."""
        part = slice(start, stop)
        return take(self.observations, part), take(self.actions, part), self.learned[part]
