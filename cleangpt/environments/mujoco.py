"""Experts for Gymnasium's tasks of MuJoCo (Todorov et al. 2012): linear controllers, inverse kinematics, a gait."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

INNER, OUTER = 0.1, 0.11
"""Lengths of Reacher's two links, up to the fingertip."""


def inverted_pendulum(simulation: Any, observation: Any) -> NDArray[np.float32]:
    """The linear-quadratic regulator of the linearized cart with a pole, for costs of 1, 10, 0.1, 0.1 and 0.1."""
    force = np.dot([1.73, 12.259, 2.014, 1.819], observation)
    return np.array([np.clip(force, -3, 3)], np.float32)


def inverted_double_pendulum(simulation: Any, observation: Any) -> NDArray[np.float32]:
    """The same for a cart with two poles, for costs of 1, 10, 10, 0.1, 0.1, 0.1 and 0.1."""
    position, sine, second_sine, cosine, second_cosine, *velocities = observation[:8]
    angles = math.atan2(sine, cosine), math.atan2(second_sine, second_cosine)
    force = -np.dot([0.245, 2.111, 6.116, 0.359, 1.008, 0.907], [position, *angles, *velocities])
    return np.array([np.clip(force, -1, 1)], np.float32)


def reacher(simulation: Any, observation: Any) -> NDArray[np.float32]:
    """Turns both joints towards the angles that bring the fingertip to the target, by a PD controller."""
    first, second = np.arctan2(observation[2:4], observation[:2])
    x, y = observation[4:6]
    distance = min(max(math.hypot(x, y), OUTER - INNER + 1e-4), OUTER + INNER - 1e-4)
    elbow = math.acos((distance**2 - INNER**2 - OUTER**2) / (2 * INNER * OUTER))
    elbow = math.copysign(elbow, second)
    shoulder = math.atan2(y, x) - math.atan2(OUTER * math.sin(elbow), INNER + OUTER * math.cos(elbow))
    errors = np.array([shoulder - first, elbow - second])
    errors = (errors + math.pi) % (2 * math.pi) - math.pi
    return np.asarray(np.clip(0.3 * errors - 0.06 * observation[6:8], -1, 1), np.float32)


def swimmer(simulation: Any, observation: Any) -> NDArray[np.float32]:
    """A wave along the body: sines of time, one joint after the other."""
    phase = 2 * math.pi * 0.6 * float(simulation.unwrapped.data.time)
    return np.array([math.sin(phase), math.sin(phase - 1.6)], np.float32)
