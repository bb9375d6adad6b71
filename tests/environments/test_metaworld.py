"""Tasks of Meta-World: goals by seed, success as the reward, and the scripted experts."""

from typing import Any

import numpy as np
import pytest

from cleangpt.environments.experts import find_expert, record
from cleangpt.environments.gymnasium import make
from cleangpt.environments.metaworld import Task
from cleangpt.errors import UserError

gymnasium = pytest.importorskip("gymnasium")


class Arm(gymnasium.Env):  # type: ignore[misc, type-arg]
    """What is like a simulation of Meta-World: a number that reaches its goal is a success, and rewards say nothing."""

    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    observation_space = gymnasium.spaces.Box(0, 0, (2,), np.float64)
    max_path_length = 6

    def set_task(self, task: float) -> None:
        self.goal = task

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.place = 0.0
        return np.array([self.place, self.goal]), {}

    def step(self, action: Any) -> Any:
        self.place += float(action[0])
        success = float(abs(self.place - self.goal) < 0.5)
        return np.array([self.place, self.goal]), 7.0, False, False, {"success": success}


def towards(simulation: Any, observation: Any) -> Any:
    return np.array([9.0 if observation[1] > observation[0] else -9.0])


def test_the_seed_chooses_the_goal() -> None:
    task = Task("arm", Arm(), [1.0, 2.0, 3.0, -2.0])
    goals = [task.reset(seed=seed)[0][1] for seed in (1, 2, 1, 2, 3, 4, 5)]
    assert goals[:2] == goals[2:4] and len({*goals}) > 2


def test_success_is_the_reward_and_ends_an_episode_and_so_does_time() -> None:
    task = Task("arm", Arm(), [3.0])
    _, actions, rewards, _, terminated = record(task, towards, 1)
    assert rewards == [0.0, 0.0, 1.0] and terminated and len(actions) == 3  # actions are clipped to 1
    far = Task("arm", Arm(), [30.0])
    assert record(far, towards, 1)[2] == [0.0] * 6 and not record(far, towards, 1)[4]


# With the package -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scripted_experts_fulfil_their_tasks() -> None:
    pytest.importorskip("metaworld")
    for name in ("Meta-World/reach-v3", "Meta-World/button-press-v3"):
        simulation, expert = make(name), find_expert(name)
        episodes = [record(simulation, expert, seed) for seed in (1, 1, 2)]
        assert all(rewards[-1] == 1.0 for _, _, rewards, _, _ in episodes)
        assert str(episodes[0]) == str(episodes[1]) != str(episodes[2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_there_is_not_is_refused() -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(UserError, match="did you mean 'reach-v3'"):
        make("Meta-World/reech-v3")


def test_without_metaworld_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "metaworld", None)
    with pytest.raises(UserError, match="pip install metaworld"):
        make("Meta-World/peg-insert-side-v3")
