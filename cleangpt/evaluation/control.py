"""Scores an agent by letting it act: return, success and the paper's score, with confidence intervals.

The score of a task is 0 for random actions and 100 for its expert (Reed et al. 2022, section 4.1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cleangpt.config import CorpusConfig
from cleangpt.corpora.episode_rows import EpisodeCorpus
from cleangpt.corpora.mixture import Mixture
from cleangpt.environments.base import Environment
from cleangpt.environments.gymnasium import Gymnasium
from cleangpt.evaluation.tasks import choose_tasks, mean_reward, task_metrics
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.simulating import Played, play_control
from cleangpt.tracking.metrics import metric_key

Z = 1.96
"""Standard errors to either side of a mean within which it is in 95 of 100 cases."""


def score_environments(
    model: LanguageModel, environments: Mapping[str, Environment], split: str, limit: int | None, device: torch.device,
    vocab_size: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """The mean reward in each environment, by metric and source; of simulations the score, and the mean of the scores.

    Args:
        model: in evaluation mode, on `device`.
        environments: by source.
        split: of the environments.
        limit: number of tasks to try in each; None: all.
        device: of the model.
        vocab_size: of the tokenizer, as in `mean_reward`.
    """
    found: dict[str, float] = {}
    for source, environment in environments.items():
        if isinstance(environment, Gymnasium):
            episodes = play_control(model, environment, split, choose_tasks(environment.tasks(split), limit), device)
            found[metric_key(environment.metric, source)] = float(np.mean([episode.score for episode in episodes]))
        else:
            reward = mean_reward(model, environment, split, limit, device, vocab_size)
            found[metric_key(environment.metric, source)] = reward
    return found | _mean(found)


def evaluate_environments(
    model: LanguageModel, environments: Mapping[str, Environment], split: str, device: torch.device,
    vocab_size: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """As `score_environments`, over all tasks, with all that `control_metrics` says of simulations, and what other
    environments measure."""
    simulated = simulations(environments)
    others = {
        metric_key(name, source): value
        for source, one in environments.items() if source not in simulated
        for name, value in task_metrics(model, one, split, device, vocab_size).items()
    }  # fmt: skip
    episodes = {
        source: play_control(model, one, split, range(one.tasks(split)), device) for source, one in simulated.items()
    }
    return others | (control_metrics(episodes) if episodes else {})


def act_otherwise(corpus: CorpusConfig, episodes: int | None, acting: Mapping[str, Any]) -> CorpusConfig:
    """A corpus whose tasks are scored by that many episodes, None: as before, with those fields of `Acting` changed."""
    if isinstance(corpus, Mixture):
        sources = (replace(source, corpus=act_otherwise(source.corpus, episodes, acting)) for source in corpus.sources)
        return replace(corpus, sources=tuple(sources))
    if isinstance(corpus, EpisodeCorpus):
        episodes = episodes or corpus.scored_episodes
        return replace(corpus, scored_episodes=episodes, acting=replace(corpus.acting, **acting))
    return corpus


def simulations(environments: Mapping[str, Environment]) -> dict[str, Gymnasium]:
    """Those of the environments that are simulations, by source."""
    return {source: one for source, one in environments.items() if isinstance(one, Gymnasium)}


def control_metrics(episodes: Mapping[str, Sequence[Played]]) -> dict[str, float]:
    """Numbers of episodes by source: means, and half the width of the score's 95 % confidence interval.

    With named sources, also the mean score over them.
    """
    found: dict[str, float] = {}
    for source, played in episodes.items():
        scores = [episode.score for episode in played]
        numbers = {
            "score": float(np.mean(scores)),
            "score_ci95": half_width(scores),
            "return": float(np.mean([episode.total for episode in played])),
            "success": float(np.mean([episode.success for episode in played])),
            "episode_length": float(np.mean([episode.length for episode in played])),
        }
        found |= {metric_key(name, source): value for name, value in numbers.items()}
    widths = [found[metric_key("score_ci95", source)] for source in episodes]
    mean = _mean(found)
    return mean | ({"score_ci95": math.hypot(*widths) / len(widths)} if mean else {}) | found


def half_width(scores: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, by the normal distribution; NaN for a single one."""
    return Z * float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan


def _mean(found: Mapping[str, float]) -> dict[str, float]:
    """The mean of the scores that name their source."""
    scores = [value for name, value in found.items() if name.startswith(f"{Gymnasium.metric}/")]
    return {Gymnasium.metric: float(np.mean(scores))} if scores else {}
