"""Scores a model on the tasks of an environment."""

import numpy as np
import torch

from cleangpt.data.shuffle import mix, permute
from cleangpt.environments.base import Environment, Episode
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import GREEDY, Sampling
from cleangpt.models.base import LanguageModel

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
    episodes = play(Engine(model, device, max_batch=MAX_BATCH), environment, split, limit)
    return sum(episode.total_reward for episode in episodes) / len(episodes)


def play(
    engine: Engine, environment: Environment, split: str, limit: int | None, sampling: Sampling = GREEDY
) -> list[Episode]:
    """An episode of each task, `limit` of them as in `mean_reward`; the seed of each is one higher."""
    tasks = choose_tasks(environment.tasks(split), limit)
    episodes = [Episode(split, task, environment.reset(split, task)) for task in tasks]
    seeds = {id(episode): sampling.seed + number for number, episode in enumerate(episodes)}
    acting: dict[int, tuple[Episode, list[int]]] = {}

    def act(episode: Episode) -> None:
        prompt = episode.prompt
        request_id = engine.submit(
            episode.tokens, max_new_tokens=prompt.max_new_tokens, stop_ids=prompt.stop_ids, sampling=sampling,
            seed=seeds[id(episode)],
        )  # fmt: skip
        acting[request_id] = (episode, [])

    for episode in episodes:
        act(episode)
    for outputs in engine.steps():
        for request_id, (token, finish_reason) in outputs.items():
            episode, action = acting[request_id]
            action.append(token.id)
            if finish_reason is not None:
                feedback = environment.step(episode, action)
                episode.actions.append(action)
                episode.feedback.append(feedback)
                del acting[request_id]
                if not feedback.done:
                    act(episode)
    return episodes


def choose_tasks(count: int, limit: int | None) -> list[int]:
    """All of `count` tasks, or `limit` of them, always the same ones, chosen by a fixed permutation."""
    tasks = np.arange(count)
    if limit is not None and limit < count:
        tasks = np.sort(permute(tasks[:limit], count, mix(1)))
    return [int(task) for task in tasks]
