"""A simulation of Gymnasium for tests: pictures, numbers, discrete values and a text in an observation."""

from typing import Any

import gymnasium
import numpy as np

from cleangpt.environments.experts import EXPERTS

ROWS, COLUMNS = 20, 24
"""Height and width of its pictures."""


class Window(gymnasium.Env):  # type: ignore[type-arg]
    """A bright column in a picture is to be followed: 0 is left, 1 stay, 2 right; the reward is 1 where it was."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gymnasium.spaces.Dict(
        view=gymnasium.spaces.Box(0, 255, (ROWS, COLUMNS, 3), np.uint8),
        speed=gymnasium.spaces.Box(-5, 5, (2,)),
        gear=gymnasium.spaces.Discrete(3),
        mission=gymnasium.spaces.Text(20),
    )
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.column, self.steps = int(self.np_random.integers(1, COLUMNS - 1)), 0
        return self.look(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        right = int(action) == follow(self, self.look())
        self.column = 1 + int(self.np_random.integers(COLUMNS - 2))
        self.steps += 1
        return self.look(), float(right), self.steps == 9, False, {"success": right}

    def look(self) -> dict[str, Any]:
        view = np.zeros((ROWS, COLUMNS, 3), np.uint8)
        view[:, self.column] = 255, 10 * self.steps, 0
        speed = np.array([self.column / COLUMNS, -self.steps], np.float32)
        return {"view": view, "speed": speed, "gear": self.steps % 3, "mission": "follow"}

    def render(self) -> Any:
        return self.look()["view"]


def follow(simulation: Any, observation: dict[str, Any]) -> int:
    """Which third of the picture the bright column is in."""
    return int(observation["view"][0, :, 0].argmax()) * 3 // COLUMNS


def register() -> str:
    """Registers the simulation and its expert; returns its name."""
    name = "Window-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, Window)
    EXPERTS[name] = follow
    return name
