"""Experts that need no download: rules for tasks of Gymnasium, one function each; see `EXPERTS`."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cleangpt.environments import atari, metaworld, minigrid, mujoco, tables
from cleangpt.environments.acting import Lost
from cleangpt.errors import UserError, require

Policy = Callable[[Any, Any], Any]
"""From a simulation and its observation to an action."""


def cart_pole(simulation: Any, observation: Any) -> int:
    """Pushes to the side to which cart and pole lean and move: the sign of a linear function."""
    position, velocity, angle, rotation = observation
    return int(0.5 * position + velocity + 12 * angle + 2.5 * rotation > 0)


def acrobot(simulation: Any, observation: Any) -> int:
    """Swings with the first joint: torque on the second against the first one's velocity."""
    return 0 if observation[4] > 0 else 2


def mountain_car(simulation: Any, observation: Any) -> int:
    """Pushes right within a band of velocities, else left, so that the car swings up in as few swings as it can."""
    position, velocity = observation
    lower = min(-0.09 * (position + 0.25) ** 2 + 0.03, 0.3 * (position + 0.9) ** 4 - 0.008)
    upper = -0.07 * (position + 0.38) ** 2 + 0.07
    return 2 if lower <= velocity <= upper else 0


def mountain_car_continuous(simulation: Any, observation: Any) -> Any:
    """Pushes in the direction of motion."""
    return np.array([1.0 if observation[1] >= 0 else -1.0], np.float32)


def pendulum(simulation: Any, observation: Any) -> Any:
    """Pumps energy until the pendulum can reach the top, then holds it there by a PD controller."""
    cosine, sine, velocity = observation
    angle = math.atan2(sine, cosine)
    energy = velocity**2 / 2 + 15 * (cosine - 1)
    if cosine > 0.8 and abs(energy) < 6:
        torque = -(12 * angle + 3 * velocity)
    else:
        torque = -2.0 * math.tanh(energy) * (1.0 if velocity >= 0 else -1.0)
    return np.array([min(max(torque, -2.0), 2.0)], np.float32)


def lunar_lander(simulation: Any, observation: Any) -> Any:
    """The heuristic that comes with Gymnasium."""
    heuristic = require("gymnasium.envs.box2d.lunar_lander").heuristic
    return heuristic(simulation.unwrapped, observation)


EXPERTS: dict[str, Policy] = {
    "ALE/Breakout-v5": atari.breakout,
    "ALE/Freeway-v5": atari.freeway,
    "Acrobot-v1": acrobot,
    "BabyAI-": minigrid.bot,
    "CartPole-v1": cart_pole,
    "CliffWalking-": tables.planned,
    "CliffWalkingSlippery-": tables.planned,
    "FrozenLake-": tables.planned,
    "FrozenLake8x8-": tables.planned,
    "InvertedDoublePendulum-v5": mujoco.inverted_double_pendulum,
    "InvertedPendulum-v5": mujoco.inverted_pendulum,
    "LunarLander-v3": lunar_lander,
    "LunarLanderContinuous-v3": lunar_lander,
    "Meta-World/": metaworld.scripted,
    "MountainCar-v0": mountain_car,
    "MountainCarContinuous-v0": mountain_car_continuous,
    "Pendulum-v1": pendulum,
    "Reacher-v5": mujoco.reacher,
    "Swimmer-v5": mujoco.swimmer,
    "Taxi-": tables.planned,
}
"""Experts by the name of their environment, or by how it starts; registering your own is one line in your experiment
file."""


def find_expert(name: str) -> Policy:
    """The expert for an environment.

    Raises:
        UserError: there is none.
    """
    starts = [start for start in EXPERTS if start.endswith(("-", "/")) and name.startswith(start)]
    found = EXPERTS.get(name) or (EXPERTS[starts[0]] if starts else None)
    if found is None:
        raise UserError(
            f"there is no expert for {name!r}; allowed: {', '.join(EXPERTS)}, one of your own, EXPERTS[{name!r}] = …, "
            "or the corpus Episodes, which reads recorded ones"
        )
    return found


def record(
    simulation: Any, policy: Policy, seed: int, *, noise: float = 0.0, longest: int = 10
) -> tuple[list[Any], list[Any], list[float], list[bool], bool]:
    """Plays an episode.

    Args:
        simulation: a `gymnasium.Env`.
        policy: acts.
        seed: of start and noise.
        noise: probability that a burst of random actions begins at a step; their steps are not to be imitated, those
            after them show how to recover. 1: nothing but random actions.
        longest: most steps of a burst, whose lengths are uniform.

    Returns:
        Observations, one more than steps; actions; rewards; whether each action was the policy's; whether the episode
        terminated.
    """
    choices = np.random.default_rng(seed)
    simulation.action_space.seed(seed)
    observation, _ = simulation.reset(seed=seed)
    observations, actions, rewards, own = [observation], list[Any](), list[float](), list[bool]()
    left = 0
    while True:
        if not left and choices.random() < noise:
            left = int(choices.integers(1, longest + 1))
        try:
            action = simulation.action_space.sample() if left else policy(simulation, observation)
        except Lost:
            return observations, actions, rewards, own, False
        own.append(not left)
        left = max(0, left - 1)
        observation, reward, terminated, truncated, _ = simulation.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        if terminated or truncated:
            return observations, actions, rewards, own, bool(terminated)
