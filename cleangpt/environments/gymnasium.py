"""Environments of Gymnasium (Towers et al. 2024), or of any package that registers its own there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.modalities import Box, Dict, Discrete, Image, Modalities, Space, Values
from cleangpt.data.shuffle import mix
from cleangpt.data.timesteps import Steps, Timesteps
from cleangpt.data.tokenizers import ModalityTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.environments.atari import make_game
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.environments.metaworld import PREFIX, make_task
from cleangpt.environments.minigrid import make_grid
from cleangpt.environments.tables import make_cliff
from cleangpt.errors import UserError, nearest, require

Arguments = tuple[tuple[str, str | int | float | bool], ...]
"""Keyword arguments of an environment's constructor, in pairs."""
MAKERS: dict[str, Callable[..., Any]] = {
    "ALE/": make_game, "BabyAI-": make_grid, "CliffWalking": make_cliff, "MiniGrid-": make_grid, PREFIX: make_task,
}  # fmt: skip
"""What makes simulations that are not as Gymnasium makes its own, by how their names start."""
SMALLEST_PICTURE = 16
"""Height and width in pixels from which an array of bytes is a picture; a smaller one is a grid of discrete values."""
DEFAULT_MODALITIES = Modalities()
OF_ACTIONS = Modalities(scale="bounds")


@dataclass(frozen=True)
class Gymnasium(Environment):
    """One task, started from a different seed in every episode; scored 0 for a random policy and 100 for the expert."""

    metric: ClassVar[str] = "score"
    simulated: ClassVar[bool] = True

    name: str
    """Its id, such as CartPole-v1."""
    tokenizer: ModalityTokenizer
    arguments: Arguments = ()
    acting: Acting = Acting()  # noqa: RUF009 - frozen
    expert_return: float = 1.0
    """Mean return of the expert."""
    random_return: float = 0.0
    """Mean return of random actions."""
    episodes: int = 50
    """Episodes that score a checkpoint."""
    returns: bool = False
    """Whether observations begin with the return that is to come."""
    instruction: str = ""
    """A text before the first observation, which also has its own."""
    seed: int = 1337
    """Of the order of starts."""
    prompts: Sequence[Steps] = field(default=(), compare=False)
    """Steps of episodes, one of which an agent reads before its own; none: it reads no prompt."""

    @property
    def steps(self) -> Timesteps:
        """How its steps become tokens."""
        observation, action = spaces(self.name, self.arguments, self.tokenizer.modalities)
        return Timesteps(self.tokenizer.ranges, observation, action, self.returns)

    def make(self, render: bool = False) -> Any:
        """A new simulation, a `gymnasium.Env`; with `render`, its frames are pictures."""
        return make(self.name, self.arguments, render)

    def start_seed(self, split: str, task: int) -> int:
        """The seed of an episode."""
        return mix(self.seed, *split.encode(), task) % 2**31

    def prompt(self, seed: int) -> Steps | None:
        """The steps that an agent reads before an episode."""
        return self.prompts[mix(self.seed, seed, 1) % len(self.prompts)] if self.prompts else None

    def score(self, total: float) -> float:
        """100 x (return - random) / (expert - random): Reed et al. 2022, section 4.1."""
        return 100 * (total - self.random_return) / (self.expert_return - self.random_return)

    def succeeded(self, simulation: Any, total: float, last_info: Mapping[str, Any]) -> bool:
        """Whether an episode reached its goal: as the simulation says, else if its return reaches the threshold of its
        registration, else if it is the expert's."""
        for key in ("success", "is_success"):
            if key in last_info:
                return bool(last_info[key])
        threshold = simulation.spec.reward_threshold if simulation.spec is not None else None
        return total >= (self.expert_return if threshold is None else threshold)

    # The contract of environments -------------------------------------------------------------------------------------

    def tasks(self, split: str) -> int:
        """Episodes that score a checkpoint."""
        return self.episodes

    def reset(self, split: str, task: int) -> Prompt:
        """The first observation."""
        seed = self.start_seed(split, task)
        simulation = self.make()
        observation, _ = simulation.reset(seed=seed)
        simulation.close()
        text, seen = self.read_text(observation), self.steps.observe(self.stack([observation]))
        inputs: dict[str, Tensor] = {}
        for name, records in seen.placed().items():
            inputs |= records.moved(len(text)).inputs(name)
        return Prompt([*text.tolist(), *seen.tokens[0].tolist()], self.steps.action.size, (), inputs, {"seed": seed})

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """Plays the episode again up to here, since a simulation changes as it goes; `rollouts/agent.py` goes on."""
        simulation = self.make()
        simulation.reset(seed=episode.prompt.extras["seed"])
        for tokens in [*episode.actions, action]:
            observation, reward, terminated, truncated, _ = simulation.step(self.action(tokens))
        simulation.close()
        return Feedback(float(reward), bool(terminated or truncated), self._read(observation))

    def read_text(self, observation: Any) -> NDArray[np.int64]:
        """The tokens of the instruction and of the texts in a first observation."""
        return encode_text(self.tokenizer, self.instruction, split_text(observation)[0])

    def stack(self, observations: Sequence[Any]) -> Values:
        """Observations of simulations as a batch of values, without their texts."""
        return self.steps.observation.stack([split_text(observation)[1] for observation in observations])

    def action(self, tokens: Sequence[int]) -> Any:
        """The action that tokens stand for, as a simulation takes it."""
        steps = self.steps
        return item(steps.action.decode(np.array([tokens]), steps.ranges, action=True), 0)

    def _read(self, observation: Any) -> list[int]:
        """The tokens of an observation, and the separator."""
        tokens: list[int] = self.steps.observe(self.stack([observation])).tokens[0].tolist()
        return tokens


def encode_text(tokenizer: ModalityTokenizer, *texts: str) -> NDArray[np.int64]:
    """The tokens of texts, joined by blanks; none if there is no text."""
    text = " ".join(filter(None, texts))
    return tokenizer.encode(text) if text else np.zeros(0, np.int64)


def item(values: Values, row: int) -> Any:
    """One of a batch of values, as a simulation takes it."""
    if isinstance(values, dict):
        return {key: item(part, row) for key, part in values.items()}
    value = values[row]
    return value.item() if value.ndim == 0 else value


def make(name: str, arguments: Arguments = (), render: bool = False) -> Any:
    """A new simulation.

    Raises:
        UserError: Gymnasium or a package that it needs is missing, or there is no such environment.
    """
    gymnasium = require("gymnasium")
    maker = next((maker for start, maker in MAKERS.items() if name.startswith(start)), gymnasium.make)
    try:
        return maker(name, render_mode="rgb_array" if render else None, **dict(arguments))
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"the environment {name} needs a package that is not installed: {error}") from None
    except gymnasium.error.Error as error:
        raise UserError(
            f"the environment {name!r} cannot be made: {error}{nearest(name, gymnasium.registry)}"
        ) from None
    except TypeError as error:
        raise UserError(f"the environment {name} does not take {dict(arguments)!r}: {error}") from None


@lru_cache(maxsize=64)
def spaces(name: str, arguments: Arguments = (), modalities: Modalities = DEFAULT_MODALITIES) -> tuple[Space, Space]:
    """The spaces of an environment's observations, without texts, and of its actions."""
    simulation = make(name, arguments)
    found = convert(simulation.observation_space, modalities), convert(simulation.action_space, OF_ACTIONS)
    simulation.close()
    return found


def convert(space: Any, modalities: Modalities = DEFAULT_MODALITIES) -> Space:
    """A space of Gymnasium as ours. Bytes of shape `(height, width, 1 or 3)` with sides of 16 or more are a picture.

    Args:
        space: of observations or actions.
        modalities: the size that pictures are given, and the scale of numbers.

    Raises:
        UserError: it is of an unknown kind.
    """
    kinds = require("gymnasium").spaces
    if _is_picture(space):
        return Image(modalities.image_height, modalities.image_width, modalities.image_tokens)
    if isinstance(space, kinds.Box) and np.issubdtype(space.dtype, np.integer):
        counts = (space.high.astype(np.int64) - space.low.astype(np.int64) + 1).reshape(-1)
        return Discrete(tuple(counts.tolist()), space.shape, tuple(space.low.reshape(-1).astype(int).tolist()))
    if isinstance(space, kinds.Box):
        ones = np.ones(space.shape)
        low, high = (-ones, ones) if modalities.scale == "none" else (space.low, space.high)
        if modalities.scale == "mu_law" or not np.isfinite([low, high]).all():
            return Box(space.shape)
        return Box(space.shape, tuple(low.reshape(-1).tolist()), tuple(high.reshape(-1).tolist()))
    if isinstance(space, kinds.Discrete):
        return Discrete((int(space.n),), (), (int(space.start),))
    if isinstance(space, kinds.MultiDiscrete):
        start = tuple(np.broadcast_to(space.start, space.shape).reshape(-1).astype(int).tolist())
        return Discrete(tuple(space.nvec.reshape(-1).astype(int).tolist()), space.shape, start)
    if isinstance(space, kinds.MultiBinary):
        return Discrete((2,) * int(np.prod(space.shape)), space.shape, boolean=True)
    if isinstance(space, kinds.Dict | kinds.Tuple):
        pairs = space.items() if isinstance(space, kinds.Dict) else enumerate(space)
        parts = ((str(key), part) for key, part in pairs if not _is_text(part))
        return Dict(tuple((key, convert(part, modalities)) for key, part in parts))
    raise UserError(f"a space is {space}; allowed: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple, Text")


def _is_picture(space: Any) -> bool:
    """Whether a space has pictures, as `convert` says."""
    if space.dtype != np.uint8 or len(space.shape or ()) != 3:
        return False
    return space.shape[2] in (1, 3) and min(space.shape[:2]) >= SMALLEST_PICTURE


def _is_text(space: Any) -> bool:
    """Whether a space has texts; missions of MiniGrid are not of Gymnasium's kind."""
    return isinstance(space, require("gymnasium").spaces.Text) or getattr(space.dtype, "kind", "") == "U"


def split_text(observation: Any) -> tuple[str, Any]:
    """The texts in an observation, joined by blanks in the order of their keys, and what else it has."""
    if isinstance(observation, tuple):
        observation = {str(number): part for number, part in enumerate(observation)}
    if not isinstance(observation, dict):
        return "", observation
    found = {key: split_text(part) if isinstance(part, dict | tuple) else (
        (part, None) if isinstance(part, str) else ("", part)) for key, part in observation.items()}  # fmt: skip
    texts = [text for key in sorted(found) if (text := found[key][0])]
    rest = {key: part for key, (_, part) in found.items() if not isinstance(observation[key], str)}
    return " ".join(texts), rest
