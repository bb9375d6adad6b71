"""Scores a model on the tasks of an environment."""

import numpy as np
import torch

from cleangpt.data.shuffle import mix, permute
from cleangpt.environments.base import Environment, Episode
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import GREEDY, Sampling
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.episodes import play

MAX_BATCH = 1024
"""Episodes generated as one batch."""


def mean_reward(
    model: LanguageModel, environment: Environment, split: str, limit: int | None, device: torch.device,
    vocab_size: int | None = None,
) -> float:  # fmt: skip
    """The mean over tasks of an episode's total reward, with greedy decoding.

    Args:
        model: in evaluation mode, on `device`.
        environment: of the tasks.
        split: of the environment.
        limit: number of tasks to try, always the same ones, spread over the split; None: all.
        device: of the model.
        vocab_size: of the tokenizer; higher token ids pad the embedding. None: there are none.
    """
    episodes = play_tasks(Engine(model, device, vocab_size=vocab_size, max_batch=MAX_BATCH), environment, split, limit)
    return sum(episode.total_reward for episode in episodes) / len(episodes)


def task_metrics(
    model: LanguageModel, environment: Environment, split: str, device: torch.device, vocab_size: int | None = None
) -> dict[str, float]:
    """The mean reward over all tasks, as `mean_reward`, and the mean of each measure over the episodes that have it."""
    episodes = play_tasks(Engine(model, device, vocab_size=vocab_size, max_batch=MAX_BATCH), environment, split, None)
    measured: dict[str, list[float]] = {}
    for episode in episodes:
        for name, value in environment.measures(episode).items():
            measured.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in sorted(measured.items())}
    return {environment.metric: sum(episode.total_reward for episode in episodes) / len(episodes), **means}


def play_tasks(
    engine: Engine, environment: Environment, split: str, limit: int | None, sampling: Sampling = GREEDY
) -> list[Episode]:
    """An episode of each task, `limit` of them as in `mean_reward`; each with a seed of its own."""
    tasks = choose_tasks(environment.tasks(split), limit)
    episodes = [Episode(split, task, environment.reset(split, task)) for task in tasks]
    seeds = [sampling.seed + number for number in range(len(episodes))]
    play(engine, environment, episodes, sampling=sampling, seeds=seeds)
    return episodes


def choose_tasks(count: int, limit: int | None) -> list[int]:
    """All of `count` tasks, or `limit` of them, always the same ones, chosen by a fixed permutation."""
    tasks = np.arange(count)
    if limit is not None and limit < count:
        tasks = np.sort(permute(tasks[:limit], count, mix(1)))
    return [int(task) for task in tasks]
