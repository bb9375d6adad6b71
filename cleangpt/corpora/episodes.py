"""Your own episodes: files of JSON lines, or datasets of Minari."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cleangpt.corpora.base import stamp
from cleangpt.corpora.demonstrations import RANDOM, demonstrate
from cleangpt.corpora.episode_files import read_episodes, read_minari
from cleangpt.corpora.episode_rows import EpisodeCorpus, References
from cleangpt.corpora.reading import find_files
from cleangpt.data.shuffle import mix
from cleangpt.data.trajectories import Trajectory
from cleangpt.environments.gymnasium import make
from cleangpt.errors import UserError
from cleangpt.validation import Bounds, File

RANDOM_EPISODES = 50
"""Episodes over which the return of random actions is measured."""


@dataclass(frozen=True, kw_only=True)
class Episodes(EpisodeCorpus):
    """Your own episodes of one task, by any policy."""

    local_fields: ClassVar[tuple[str, ...]] = (*EpisodeCorpus.local_fields, "files")

    files: tuple[File, ...] = ()
    """Paths, globs or folders of JSON lines: .jsonl, also with .gz, .bz2, .xz or .zst."""
    minari: tuple[str, ...] = ()
    """Names of local datasets of Minari; needs the package minari."""
    expert_return: Annotated[float, Bounds()] | None = None
    """The return that scores 100; None: the largest mean over successive episodes, a tenth of them and at most 1,000
    (Reed et al. 2022, appendix)."""
    random_return: Annotated[float, Bounds()] | None = None
    """The return that scores 0; None: the mean of 50 episodes of random actions, played now."""

    def check(self) -> None:
        """Raises UserError if there is nothing to read."""
        super().check()
        if not self.files and not self.minari:
            raise UserError("corpus.files and corpus.minari are empty; allowed: one or more of either")

    def survey(self) -> tuple[int, References]:
        """The number of episodes, and the returns that the fields say."""
        returns = np.array([episode.total for episode in self._all()])
        expert = expert_return(returns) if self.expert_return is None else self.expert_return
        return len(returns), References(expert, self._random() if self.random_return is None else self.random_return)

    def episodes(self, start: int) -> Iterator[Trajectory]:
        """The episodes from number `start` on."""
        return islice(self._all(), start, None)

    def source(self) -> dict[str, Any]:
        """The files."""
        return {"files": [[str(path), *stamp(path)] for path in find_files(self.files)] if self.files else []}

    def _all(self) -> Iterator[Trajectory]:
        of = self.spaces()
        for path in find_files(self.files) if self.files else []:
            yield from read_episodes(path, of)
        for name in self.minari:
            yield from read_minari(name, of)

    def _random(self) -> float:
        simulation, of = make(self.env, self.arguments), self.spaces()
        seeds = (mix(self.seed, RANDOM, number) % 2**31 for number in range(RANDOM_EPISODES))

        def act(simulation: Any, observation: Any) -> Any:
            return simulation.action_space.sample()

        return float(np.mean([demonstrate(simulation, act, of, seed).total for seed in seeds]))


def expert_return(returns: NDArray[np.float64]) -> float:
    """The largest mean of min(1000, a tenth) successive returns, at least one."""
    window = max(1, min(1000, len(returns) // 10))
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    return float((sums[window:] - sums[:-window]).max() / window) if len(returns) else 0.0
