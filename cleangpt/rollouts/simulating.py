"""Plays episodes of a simulated task with a model, many of them in step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.data.shuffle import mix
from cleangpt.environments.gymnasium import Gymnasium, item
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.agent import Agent, Context

MAX_BATCH = 64
"""Episodes played at once."""


@dataclass
class Played:
    """An episode that the agent has played."""

    seed: int
    total: float = 0.0
    """Its return."""
    length: int = 0
    """Steps."""
    success: bool = False
    score: float = 0.0
    """0 is a random policy's, 100 the expert's."""
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    """Pictures `(height, width, 3)`, one before each action and one at the end, if they were asked for."""


def play_control(
    model: LanguageModel, environment: Gymnasium, split: str, tasks: Sequence[int], device: torch.device, *,
    pictures: bool = False, cached: bool = True,
) -> list[Played]:  # fmt: skip
    """An episode of each task.

    Args:
        model: in evaluation mode, on `device`.
        environment: of the tasks.
        split: of the environment.
        tasks: which.
        device: of the model.
        pictures: whether to render what happens.
        cached: whether to use a KV cache.
    """
    played = list[Played]()
    for start in range(0, len(tasks), MAX_BATCH):
        seeds = [environment.start_seed(split, task) for task in tasks[start : start + MAX_BATCH]]
        played += _play_batch(model, environment, seeds, device, pictures, cached)
    return played


def _play_batch(
    model: LanguageModel, environment: Gymnasium, seeds: Sequence[int], device: torch.device, pictures: bool,
    cached: bool,
) -> list[Played]:  # fmt: skip
    simulations = [environment.make(pictures) for _ in seeds]
    episodes = [Played(seed) for seed in seeds]
    observations = [simulation.reset(seed=seed)[0] for simulation, seed in zip(simulations, seeds, strict=True)]
    texts = [environment.read_text(observation) for observation in observations]
    contexts = [Context.of(text, environment.prompt(seed)) for text, seed in zip(texts, seeds, strict=True)]
    steps, running = environment.steps, list(range(len(seeds)))
    agent = Agent(
        model, device, steps, environment.acting, contexts, [mix(environment.seed, seed) for seed in seeds],
        cached=cached,
    )  # fmt: skip
    target = environment.expert_return if environment.acting.target is None else environment.acting.target
    while running:
        values = environment.stack([observations[number] for number in running])
        left = np.array([target - episodes[number].total for number in running])
        actions, going = agent.act(values, left if environment.returns else None), list[int]()
        for row, number in enumerate(running):
            simulation, episode = simulations[number], episodes[number]
            if pictures:
                episode.frames.append(np.asarray(simulation.render(), np.uint8))
            observations[number], done = _step(simulation, episode, item(actions, row), environment)
            if not done:
                going.append(row)
        running = [running[row] for row in going]
        if len(going) < len(agent.lengths):
            agent.keep(going)
    for simulation, episode in zip(simulations, episodes, strict=True):
        if pictures:
            episode.frames.append(np.asarray(simulation.render(), np.uint8))
        simulation.close()
    return episodes


def _step(simulation: Any, episode: Played, action: Any, environment: Gymnasium) -> tuple[Any, bool]:
    """Acts; returns the next observation, and whether the episode is over."""
    observation, reward, terminated, truncated, info = simulation.step(action)
    episode.total += float(reward)
    episode.length += 1
    done = bool(terminated or truncated)
    if done:
        episode.success = environment.succeeded(simulation, episode.total, info)
        episode.score = environment.score(episode.total)
    return observation, done
