"""Meta-World (Yu et al. 2020; version 3): a robot arm with fifty tasks, and the scripted experts that come with it.

The package metaworld is needed where a simulation is made. An episode ends with its success, for which the reward is 1:
the return of Meta-World's own rewards would be the lower, the sooner a task is done.
"""

import warnings
from functools import lru_cache
from typing import Any

import numpy as np

from cleangpt.errors import UserError, nearest, require

PREFIX = "Meta-World/"
"""Begins the names of simulations."""
GOALS = 1
"""Seed of the fifty goals of each task."""


def make_task(name: str, render_mode: str | None, **fields: Any) -> "Task":
    """A simulation by its name, such as Meta-World/reach-v3; `fields` are its constructor's.

    Raises:
        UserError: metaworld is not installed, or there is no such task.
    """
    kind, goals = _goals(name.removeprefix(PREFIX))
    return Task(name.removeprefix(PREFIX), kind(render_mode=render_mode, **fields), goals)


@lru_cache(maxsize=64)
def _goals(task: str) -> tuple[Any, list[Any]]:
    """The class of a task's simulations, and its goals."""
    metaworld, known = require("metaworld"), require("metaworld.policies").ENV_POLICY_MAP
    if task not in known:
        raise UserError(f"the environment {PREFIX}{task} cannot be made: Meta-World has none{nearest(task, known)}")
    benchmark = metaworld.MT1(task, seed=GOALS)
    return benchmark.train_classes[task], benchmark.train_tasks


class Task:
    """A simulation of Meta-World, with the part of `gymnasium.Env` that is needed.

    Args:
        name: of the task, such as reach-v3.
        simulation: one of Meta-World's.
        goals: what can be set as its task.
    """

    def __init__(self, name: str, simulation: Any, goals: list[Any]) -> None:
        spaces = require("gymnasium").spaces
        self.name, self.simulation, self.goals = name, simulation, goals
        self.unwrapped, self.spec = simulation, None
        self.expert: Any = None
        simulation.set_task(goals[0])
        self.action_space = simulation.action_space
        self.observation_space = spaces.Box(-np.inf, np.inf, simulation.observation_space.shape)

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode, whose goal the seed chooses."""
        self.simulation.set_task(self.goals[int(np.random.default_rng(seed).integers(len(self.goals)))])
        observation, info = self.simulation.reset(seed=seed)
        self._left = int(self.simulation.max_path_length)
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Acts; success ends an episode."""
        action = np.clip(np.asarray(action, np.float32), -1, 1)
        observation, _, _, truncated, info = self.simulation.step(action)
        self._left -= 1
        success = bool(info["success"])
        return observation, float(success), success, bool(truncated) or self._left <= 0, {**info, "success": success}

    def render(self) -> Any:
        """What the camera sees."""
        return self.simulation.render()

    def close(self) -> None:
        """Closes it."""
        self.simulation.close()


def scripted(simulation: Task, observation: Any) -> Any:
    """The task's own expert."""
    if simulation.expert is None:
        simulation.expert = require("metaworld.policies").ENV_POLICY_MAP[simulation.name]()
    with warnings.catch_warnings(action="ignore"):  # that some actions will be clipped
        return np.clip(simulation.expert.get_action(observation), -1, 1).astype(np.float32)
