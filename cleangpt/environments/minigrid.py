"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2019 and 2023): missions in words, a grid seen in part, BabyAI's bot.

The package minigrid is needed where a simulation is made. It describes each of the 7 x 7 cells that are seen by three
bytes; here each is one discrete value, kind x colour x state. With ``view="goals"`` things that the mission names first
are of the kind goal; with ``view="objects"`` each object is a vector, wherever it is, which also says what the mission
is and on which side of the episode's start the object lies; with ``view="pictures"`` all are one picture.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from cleangpt.environments.acting import Lost
from cleangpt.errors import UserError, require

KINDS, COLOURS, STATES = 11, 6, 3
"""Of cells, as minigrid counts them."""
UNSEEN, WALL, DOOR, GOAL = 0, 2, 4, 8
"""Kinds; those from the door on are objects."""
OBJECTS = 8
"""Objects that are shown at most, those nearest to the agent."""
COLOUR_NAMES = ("red", "green", "blue", "purple", "yellow", "grey")
KIND_NAMES = ("door", "key", "ball", "box")
"""In minigrid's order."""
OTHER_WORDS = ("go", "pick", "open", "put", "left", "right", "front", "behind")
"""Of missions: what to do, and where the thing is, as seen from the start."""
SIDES = 4
"""The last of these."""
THINGS = 2
"""Whose colours and kinds are told at most, the first that a mission names."""
View = Literal["cells", "goals", "objects", "pictures"]
"""How cells are shown."""


def make_grid(name: str, render_mode: str | None, view: View = "cells", **fields: Any) -> "Grid":
    """A simulation by its name, such as BabyAI-GoToLocal-v0; `fields` are its constructor's.

    Raises:
        UserError: minigrid is not installed, or there is no such view.
    """
    if view not in get_args(View):
        raise UserError(f"view is {view!r} in corpus.arguments; allowed: {', '.join(get_args(View))}")
    gymnasium = require("gymnasium")
    gymnasium.register_envs(require("minigrid"))
    simulation = gymnasium.make(name, render_mode=render_mode, **fields)
    if view == "pictures":
        simulation = require("minigrid.wrappers").RGBImgPartialObsWrapper(simulation)
    return Grid(simulation, view)


class Grid:
    """A simulation of minigrid, with the part of `gymnasium.Env` that is needed, and BabyAI's bot beside it.

    Args:
        simulation: of minigrid.
        view: what becomes of the three bytes of each cell; of pictures nothing.
    """

    def __init__(self, simulation: Any, view: View = "cells") -> None:
        spaces = require("gymnasium").spaces
        self.simulation, self.view = simulation, view
        self.action_space, self.spec, self.unwrapped = simulation.action_space, simulation.spec, simulation.unwrapped
        parts = dict(simulation.observation_space.items())
        seen = parts["image"].shape
        if view in ("cells", "goals"):
            parts["image"] = spaces.MultiDiscrete([KINDS * COLOURS * STATES] * (seen[0] * seen[1]))
        elif view == "objects":
            parts["image"] = spaces.Box(0, 1, objects(np.zeros(seen, np.uint8), "", np.zeros((0, SIDES))).shape)
        self.observation_space = spaces.Dict(parts)
        self._bot: Any = None
        self._advice: Any = None
        """What the bot would do next; an exception if it does not know."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode; minigrid prints about grids that it rejects, which nobody wants to read."""
        with contextlib.redirect_stdout(io.StringIO()):
            observation, info = self.simulation.reset(seed=seed)
        self._bot = None
        if self.view == "objects":
            self._start = Pose.of(self.unwrapped)
        return self._seen(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Acts; an episode is a success if it is rewarded."""
        observation, reward, terminated, truncated, info = self.simulation.step(action)
        if self._bot is not None and not (terminated or truncated):
            self._ask(action)
        return self._seen(observation), float(reward), terminated, truncated, {**info, "success": reward > 0}

    def advice(self) -> int:
        """What BabyAI's bot would do.

        Raises:
            Lost: it does not know, such as after a box has been opened.
        """
        if self._bot is None:
            self._bot = require("minigrid.utils.baby_ai_bot").BabyAIBot(self.simulation)
            self._ask(None)
        if isinstance(self._advice, Exception):
            raise Lost from self._advice
        return int(self._advice)

    def render(self) -> Any:
        """The whole grid as a picture."""
        return self.simulation.render()

    def close(self) -> None:
        """Closes it."""
        self.simulation.close()

    def _ask(self, taken: Any) -> None:
        """Tells the bot which action was taken, and notes its advice."""
        try:
            self._advice = self._bot.replan(taken)
        except Exception as error:  # it fails in many ways where random actions have made a mission impossible
            self._advice = error

    def _seen(self, observation: dict[str, Any]) -> dict[str, Any]:
        if self.view == "pictures":
            return observation
        image, mission = observation["image"], observation.get("mission", "")
        if self.view == "objects":
            sides = sides_of_start(image.shape, self._start, Pose.of(self.unwrapped))
            return {**observation, "image": objects(image, mission, sides)}
        if self.view == "goals":
            image = with_goals(image, mission)
        return {**observation, "image": cell_ids(image)}


class Pose(NamedTuple):
    """Where the agent stands, and which way it looks: a place and unit vectors `(2,)` in the whole grid."""

    place: NDArray[np.int64]
    ahead: NDArray[np.int64]
    right: NDArray[np.int64]

    @staticmethod
    def of(simulation: Any) -> "Pose":
        """The agent's now."""
        return Pose(*(np.array(part) for part in (simulation.agent_pos, simulation.dir_vec, simulation.right_vec)))


def cell_ids(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Kinds, colours and states of cells `(columns, rows, 3)` as one number per cell `(columns * rows,)`."""
    kinds, colours, states = image.astype(np.int64).reshape(-1, 3).T
    return (kinds * COLOURS + colours) * STATES + states


def with_goals(image: NDArray[np.uint8], mission: str) -> NDArray[np.uint8]:
    """The cells `(columns, rows, 3)`; what the mission names first, by colour, kind or both, as goals of its colour."""
    first = named_things(mission)[0]
    colours, kinds = np.split(first, [len(COLOUR_NAMES)])
    named = np.isin(image[..., 0], DOOR + np.flatnonzero(kinds if kinds.any() else ~kinds))
    named &= np.isin(image[..., 1], np.flatnonzero(colours if colours.any() else ~colours))
    found = image.copy()
    found[named & first.any(), 0] = GOAL
    return found


def sides_of_start(shape: Sequence[int], start: Pose, now: Pose) -> NDArray[np.bool_]:
    """Whether each cell of a view, of `shape` (columns, rows, …), is left of, right of, in front of or behind the agent
    as it stood at the start `(columns * rows, SIDES)`, which is what missions mean by these words."""
    *_, right, ahead = _cells(shape)
    places = now.place + np.outer(ahead, now.ahead) + np.outer(right, now.right)
    right, ahead = ((places - start.place) @ axis for axis in (start.right, start.ahead))
    return np.stack([right < 0, right > 0, ahead > 0, ahead < 0], axis=1)


def objects(image: NDArray[np.uint8], mission: str, sides: NDArray[Any]) -> NDArray[np.float32]:
    """The nearest objects among cells `(columns, rows, 3)`, then where walls are and what cannot be seen, as vectors of
    ones and zeros, one after another `((OBJECTS + 2) * size,)`; with 7 x 7 cells `size` is 78.

    An object's are those of its kind, colour, state, column and row, its `sides` of the start, those of all cells being
    `(columns * rows, SIDES)`, and a 1 at the end. Every vector ends with what the mission says, so that which object it
    means can be seen from the object alone.
    """
    kinds, colours, states = image.astype(np.int64).reshape(-1, 3).T
    across, down = image.shape[:2]
    columns, rows, right, ahead = _cells(image.shape)
    nearest = np.argsort(abs(right) + ahead, kind="stable")
    near = nearest[kinds[nearest] >= DOOR][:OBJECTS]
    *begins, looks = np.cumsum([0, KINDS, COLOURS, STATES, across, down])
    found = np.zeros((OBJECTS + 2, max(looks + SIDES, across * down) + 1), np.float32)
    found[np.arange(len(near))[:, None], np.stack([kinds, colours, states, columns, rows], axis=1)[near] + begins] = 1
    found[: len(near), looks : looks + SIDES] = sides[near]
    found[: len(near), -1] = 1
    found[OBJECTS:, : across * down] = kinds == WALL, kinds == UNSEEN
    told = mission_numbers(mission)
    return np.concatenate([found, np.broadcast_to(told, (len(found), len(told)))], axis=1).reshape(-1)


def _cells(shape: Sequence[int]) -> tuple[NDArray[np.int64], ...]:
    """Columns and rows of a view's cells, and how far they lie to the right of the agent and ahead of it, four arrays
    `(columns * rows,)`; it looks from the middle of the last row."""
    across, down = shape[:2]
    columns, rows = np.divmod(np.arange(across * down), down)
    return columns, rows, columns - across // 2, down - 1 - rows


def mission_numbers(mission: str) -> NDArray[np.float32]:
    """The colours and kinds of the first things that a mission names, then which of `OTHER_WORDS` it has, as ones and
    zeros `(28,)`."""
    words = _words(mission)
    others = np.array([word in words for word in OTHER_WORDS])
    return np.concatenate([named_things(mission).reshape(-1), others]).astype(np.float32)


def named_things(mission: str) -> NDArray[np.bool_]:
    """Which of `COLOUR_NAMES` and then of `KIND_NAMES` the first things have that a mission names `(THINGS, 10)`."""
    looks = COLOUR_NAMES + KIND_NAMES
    things = np.zeros((THINGS, len(looks)), bool)
    named = 0
    for word in _words(mission):
        if word in looks and named < THINGS:
            things[named, looks.index(word)] = True
        named += word in (*KIND_NAMES, "object")
    return things


def _words(mission: str) -> list[str]:
    return mission.replace(",", " ").split()


def bot(simulation: Grid, observation: Any) -> int:
    """BabyAI's bot, which knows the whole mission and plans with what it has seen."""
    return simulation.advice()
