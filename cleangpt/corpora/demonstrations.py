"""Episodes that an expert plays now: rules for tasks of Gymnasium, which need no download, or a policy of your own.

Experts always do the right thing, so their episodes do not show how to recover from a mistake. Bursts of random actions
lead them astray; these actions are read and not learned, the expert's after them are (as Laskey et al. 2017, "DART").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cleangpt.corpora.episode_rows import EpisodeCorpus, References
from cleangpt.data.modalities import Space
from cleangpt.data.shuffle import mix
from cleangpt.data.trajectories import Trajectory
from cleangpt.environments.experts import Policy, find_expert, record
from cleangpt.environments.gymnasium import make, split_text
from cleangpt.validation import Count, Share

EXPERT, RANDOM, NOISY = 3, 4, 5
"""Keys of seeds."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations(EpisodeCorpus):
    """Episodes of an expert: a rule in `environments/experts.py`, or a policy that your own file registers there."""

    played: Count = 200
    """Episodes to play."""
    noisy_share: Share = 0.5
    """Share of the episodes with bursts of random actions."""
    noise: Share = 0.05
    """In these, probability that a burst begins at a step."""
    burst: Count = 10
    """Most random actions in a burst."""
    reference_episodes: Count = 50
    """Episodes over which the returns of expert and random policy, 100 and 0 of a score, are measured."""

    def check(self) -> None:
        """Raises UserError if there is no expert for the environment."""
        super().check()
        find_expert(self.env)

    def survey(self) -> tuple[int, References]:
        """The number of episodes; and mean returns over episodes without noise, and over episodes of nothing else."""
        simulation, means = make(self.env, self.arguments), list[float]()
        for key, noise in ((EXPERT, 0.0), (RANDOM, 1.0)):
            seeds = [mix(self.seed, key, number) for number in range(self.reference_episodes)]
            means.append(float(np.mean([self._play(simulation, seed, noise).total for seed in seeds])))
        return self.played, References(*means)

    def episodes(self, start: int) -> Iterator[Trajectory]:
        """The episodes from number `start` on."""
        simulation = make(self.env, self.arguments)
        for number in range(start, self.played):
            seed = mix(self.seed, NOISY, number)
            yield self._play(simulation, seed, self.noise if mix(seed) / 2**64 < self.noisy_share else 0.0)

    def source(self) -> dict[str, Any]:
        """How the references were measured."""
        return {"reference_episodes": self.reference_episodes}

    def _play(self, simulation: Any, seed: int, noise: float) -> Trajectory:
        return demonstrate(simulation, find_expert(self.env), self.spaces(), seed % 2**31, noise, self.burst)


def demonstrate(
    simulation: Any, policy: Policy, of: tuple[Space, Space], seed: int, noise: float = 0.0, burst: int = 10
) -> Trajectory:
    """Plays an episode; see `record`. `of` are the spaces of observations and actions."""
    seen, actions, rewards, own, terminated = record(simulation, policy, seed, noise=noise, longest=burst)
    split = [split_text(observation) for observation in seen]
    return Trajectory(
        of[0].stack([values for _, values in split]), of[1].stack(actions), np.array(rewards), np.array(own, bool),
        terminated, split[0][0],
    )  # fmt: skip
