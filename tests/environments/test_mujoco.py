"""Experts of MuJoCo's tasks."""

import math

import numpy as np
import pytest

from cleangpt.environments.experts import find_expert, record
from cleangpt.environments.gymnasium import make
from cleangpt.environments.mujoco import INNER, OUTER, inverted_double_pendulum, inverted_pendulum, reacher

pytest.importorskip("gymnasium")


def test_pendulums_are_caught_on_the_side_to_which_they_fall() -> None:
    right, left = (inverted_pendulum(None, np.array([0, angle, 0, 0]))[0] for angle in (0.1, -0.1))
    assert right > 0 > left
    upright = np.array([0.0, 0, 0, 1, 1, 0, 0, 0, 0])
    assert inverted_double_pendulum(None, upright)[0] == 0
    assert inverted_pendulum(None, np.array([0, 9, 0, 0]))[0] == 3


def test_a_reacher_at_its_target_rests_and_else_turns_towards_it() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        first, second = random.uniform(-2.4, 2.4, 2)
        x = INNER * math.cos(first) + OUTER * math.cos(first + second)
        y = INNER * math.sin(first) + OUTER * math.sin(first + second)
        angles = np.array([first, second])
        there = np.array([*np.cos(angles), *np.sin(angles), x, y, 0, 0, 0, 0])
        assert np.allclose(reacher(None, there), 0, atol=1e-3)
        turned = np.array([*np.cos(angles - 0.2), *np.sin(angles - 0.2), x, y, 0, 0, 0, 0])
        assert abs(second) < 0.3 or (reacher(None, turned) > 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("InvertedPendulum-v5", 1000), ("InvertedDoublePendulum-v5", 9359), ("Reacher-v5", -6), ("Swimmer-v5", 80)],
)
def test_experts_reach_their_returns(name: str, least: float) -> None:
    pytest.importorskip("mujoco")
    simulation = make(name)
    assert np.mean([sum(record(simulation, find_expert(name), seed)[2]) for seed in range(5)]) >= least
