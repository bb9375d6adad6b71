"""Scores a model on the tasks of an environment."""

import numpy as np
import torch

from cleangpt.data.shuffle import mix, permute
from cleangpt.environments.base import Environment, Episode
from cleangpt.inference.engine import Engine
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.episodes import play

MAX_BATCH = 1024
"""Episodes generated as one batch."""


def mean_reward(
    model: LanguageModel, environment: Environment, split: str, limit: int | None, device: torch.device
) -> float:
    """The mean over tasks of an episode's total reward, with greedy decoding.

    Args:
        model: in evaluation mode, on `device`.
        environment: of the tasks.
        split: of the environment.
        limit: number of tasks to try, always the same ones, spread over the split; None: all.
        device: of the model.
    """
    engine = Engine(model, device, max_batch=MAX_BATCH)
    tasks = choose_tasks(environment.tasks(split), limit)
    episodes = [Episode(split, task, environment.reset(split, task)) for task in tasks]
    play(engine, environment, episodes)
    return sum(episode.total_reward for episode in episodes) / len(episodes)


def choose_tasks(count: int, limit: int | None) -> list[int]:
    """All of `count` tasks, or `limit` of them, always the same ones, chosen by a fixed permutation."""
    tasks = np.arange(count)
    if limit is not None and limit < count:
        tasks = np.sort(permute(tasks[:limit], count, mix(1)))
    return [int(task) for task in tasks]
