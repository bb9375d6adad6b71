"""Episodes in files: JSON lines, one episode each, and datasets of Minari (Younis et al. 2024).

    {"observations": […], "actions": […], "rewards": […], "learned": […], "terminated": true, "text": "…"}

Observations and actions are lists with an entry per step, or objects of such lists by key; after the last action one
more observation may follow. `learned`, `terminated` and `text` may be absent.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cleangpt.corpora.reading import json_lines
from cleangpt.data.modalities import Dict, Space, Values, batch_size
from cleangpt.data.trajectories import Trajectory
from cleangpt.environments.gymnasium import make
from cleangpt.errors import PARSE_ERRORS, UserError, require
from cleangpt.files import write_text

Spaces = tuple[Space, Space]
"""Of observations and of actions."""


def read_episodes(path: Path, spaces: Spaces) -> Iterator[Trajectory]:
    """The episodes of a file of JSON lines, plain or compressed.

    Raises:
        UserError: a line is not an episode of these spaces.
    """
    for entry, location, _ in json_lines(path):
        if not isinstance(entry, dict):
            raise UserError(f"{location}: {type(entry).__name__} where an episode should be, an object")
        if missing := sorted({"observations", "actions", "rewards"} - set(entry)):
            raise UserError(f"{location}: the episode has no {missing[0]!r}")
        yield _episode(entry, location, spaces)


def write_episodes(path: Path, episodes: Iterable[Trajectory]) -> None:
    """Writes episodes as JSON lines."""
    lines = []
    for episode in episodes:
        entry: dict[str, Any] = {
            "observations": _as_lists(episode.observations), "actions": _as_lists(episode.actions),
            "rewards": episode.rewards.tolist(), "terminated": episode.terminated,
        }  # fmt: skip
        if not episode.learned.all():
            entry["learned"] = episode.learned.tolist()
        lines.append(json.dumps(entry | ({"text": episode.text} if episode.text else {}), ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_minari(name: str, spaces: Spaces) -> Iterator[Trajectory]:
    """The episodes of a local dataset of Minari.

    Raises:
        UserError: it is not here, Minari is not installed, or the spaces are others.
    """
    minari = require("minari")
    try:
        dataset = minari.load_dataset(name)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"the Minari dataset {name!r}: {error}; minari list local shows those that are here") from None
    for number, episode in enumerate(dataset.iterate_episodes()):
        entry = {
            "observations": episode.observations, "actions": episode.actions, "rewards": episode.rewards,
            "terminated": bool(np.asarray(episode.terminations)[-1]),
        }  # fmt: skip
        yield _episode(entry, f"the Minari dataset {name}, episode {number:,}", spaces)


def write_minari(name: str, episodes: Iterable[Trajectory], env: str, **facts: Any) -> None:
    """Writes episodes as a local dataset of Minari, in Arrow files; `facts` such as author are passed on to it.

    Which actions are noise, and texts, are left out, since Minari has no place for them.
    """
    minari, simulation = require("minari"), make(env)
    buffers = require("minari.data_collector.episode_buffer")
    found = []
    for number, episode in enumerate(episodes):
        steps, ended = len(episode), np.arange(len(episode)) == len(episode) - 1
        if batch_size(episode.observations) != steps + 1:
            raise UserError(f"episode {number} has no observation after its last action, which Minari needs")
        found.append(buffers.EpisodeBuffer(
            id=number, observations=_as_in(simulation.observation_space, episode.observations),
            actions=_as_in(simulation.action_space, episode.actions), rewards=episode.rewards.tolist(),
            terminations=(ended & episode.terminated).tolist(), truncations=(ended & (not episode.terminated)).tolist(),
        ))  # fmt: skip
    minari.create_dataset_from_buffers(name, found, env=simulation, data_format="arrow", **facts)
    simulation.close()


def _episode(entry: dict[str, Any], location: str, spaces: Spaces) -> Trajectory:
    """An episode, checked."""
    try:
        seen, done = (
            _values(space, entry[key]) for space, key in zip(spaces, ("observations", "actions"), strict=True)
        )
        rewards = np.array(entry["rewards"], np.float64)
        learned = np.array(entry.get("learned", [True] * len(rewards)), bool)
    except PARSE_ERRORS as error:
        raise UserError(f"{location}: not of the environment's spaces: {error}") from None
    lengths = batch_size(seen), batch_size(done), len(learned)
    steps = len(rewards)
    if not steps or rewards.ndim != 1 or lengths[1:] != (steps, steps) or lengths[0] not in (steps, steps + 1):
        raise UserError(
            f"{location}: {lengths[0]} observations, {lengths[1]} actions, {steps} rewards; allowed: one of each per "
            "step, at least one step, and one more observation at the end"
        )
    return Trajectory(seen, done, rewards, learned, bool(entry.get("terminated", False)), str(entry.get("text", "")))


def _values(space: Space, data: Any) -> Values:
    """Values of a space from lists, or from dicts of lists."""
    if isinstance(space, Dict):
        return {key: _values(part, data[key]) for key, part in space.parts}
    return space.stack(data)


def _as_in(space: Any, values: Values) -> Any:
    """Values in the dtypes of a space of Gymnasium."""
    if isinstance(values, dict):
        return {key: _as_in(space[key], part) for key, part in values.items()}
    return np.asarray(values, space.dtype)


def _as_lists(values: Values) -> Any:
    return {key: _as_lists(part) for key, part in values.items()} if isinstance(values, dict) else values.tolist()
