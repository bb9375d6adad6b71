"""The steps of an episode as tokens: observation, separator, action, each observation in one fixed order of its parts.

Next to every token stands its *place*, which the model embeds: the place among the observation's tokens, or that it
belongs to an action (Reed et al. 2022, section 2.1; all tokens of actions share one place). The loss is on actions.
Images, and vectors of numbers, are records that stand at tokens; see `data/records.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.images import IMAGES
from cleangpt.data.modalities import Box, Image, Space, TokenRanges, Values, batch_size, leaves, lookup
from cleangpt.data.records import PlacedRecords, Records

NO_PLACE, ACTION, HIDDEN, FIRST_PLACE = 0, 1, 2, 3
"""Places: of text, separators and padding; of actions; of actions that the model cannot see; of observations, from the
first of their tokens on."""
RETURN = Box(())
"""The space of a return, compressed by the μ-law."""
VECTORS = "vectors"
"""The records of a dataset that are vectors of an observation's numbers, float32."""
Leaves = list[tuple[tuple[str, ...], Space]]
"""Parts of a space and the keys that lead to them."""


@dataclass
class Steps:
    """Steps as tokens; the first three are `(steps, tokens of a step)`."""

    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    mask: NDArray[np.uint8]
    """1 where the loss counts: the tokens of actions that are to be imitated."""
    records: dict[str, NDArray[np.uint8 | np.float32]] = field(default_factory=dict)
    """`(steps, records of a step, *shape)`, by name."""
    ends: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Where each record of a step ends `(records of a step,)`: its tokens up to and including the record's last one."""

    def part(self, start: int, stop: int) -> "Steps":
        """Some of the steps."""
        records = {name: values[start:stop] for name, values in self.records.items()}
        return Steps(self.tokens[start:stop], self.places[start:stop], self.mask[start:stop], records, self.ends)

    def followed_by(self, other: "Steps") -> "Steps":
        """The same steps, each with more tokens, at which no records stand."""
        return Steps(
            np.concatenate([self.tokens, other.tokens], axis=1),
            np.concatenate([self.places, other.places], axis=1),
            np.concatenate([self.mask, other.mask], axis=1), self.records, self.ends,
        )  # fmt: skip

    def placed(self) -> dict[str, PlacedRecords]:
        """The records of all steps, with ends counted from the first step's first token."""
        first = np.arange(len(self.tokens))[:, None] * self.tokens.shape[1]
        return {
            name: PlacedRecords(values.reshape(-1, *values.shape[2:]), (first + self.ends[name]).reshape(-1))
            for name, values in self.records.items()
        }


@dataclass(frozen=True)
class Timesteps:
    """How the steps of a task become tokens."""

    ranges: TokenRanges
    observation: Space
    action: Space
    returns: bool = False
    """Whether an observation begins with the return that is to come (Chen et al. 2021, "Decision transformer")."""

    @cached_property
    def _leaves(self) -> tuple[Leaves, Leaves, Leaves]:
        """The parts of an observation in the order of their tokens: images, numbers of the vector, all others."""
        found = leaves(self.observation)
        images = [leaf for leaf in found if isinstance(leaf[1], Image)]
        numbers = [leaf for leaf in found if isinstance(leaf[1], Box) and self.ranges.modalities.vector]
        return images, numbers, [leaf for leaf in found if leaf not in images and leaf not in numbers]

    @cached_property
    def _vector_count(self) -> int:
        """Vectors that an observation's numbers fill, a token each."""
        numbers = sum(space.size for _, space in self._leaves[1])
        return math.ceil(numbers / self.ranges.modalities.vector) if numbers else 0

    @property
    def observation_size(self) -> int:
        """Tokens before a step's action."""
        images, _, others = self._leaves
        size = sum(space.size for _, space in (*images, *others)) + self._vector_count
        return self.returns + size + (self.ranges.separator is not None)

    @property
    def size(self) -> int:
        """Tokens of a step."""
        return self.observation_size + self.action.size

    @property
    def records(self) -> dict[str, Records]:
        """The kinds of records that observations have."""
        images, numbers, _ = self._leaves
        found: dict[str, Records] = {}
        if images:
            image = cast(Image, images[0][1])
            found[IMAGES] = Records(dtype="uint8", shape=(image.height, image.width, 3), tokens=image.tokens)
        if numbers:
            found[VECTORS] = Records(dtype="float32", shape=(self.ranges.modalities.vector,))
        return found

    def observe(self, observations: Values, returns: NDArray[np.float64] | None = None) -> Steps:
        """What is read before acting, of a batch of observations; with `returns` `(batch,)` that are to come.

        Raises:
            UserError: an observation is not of the task's space.
        """
        rows, (images, numbers, others) = batch_size(observations), self._leaves
        pictures = [lookup(observations, keys) for keys, _ in images]
        parts = [np.zeros((rows, space.size), np.int64) for _, space in images]
        parts.append(np.zeros((rows, self._vector_count), np.int64))
        parts += [space.encode(lookup(observations, keys), self.ranges) for keys, space in others]
        if self.returns:
            assert returns is not None
            parts.insert(0, RETURN.encode(returns, self.ranges))
        seen = np.concatenate([np.zeros((rows, 0), np.int64), *parts], axis=1)
        places = np.tile(FIRST_PLACE + np.arange(seen.shape[1]), (rows, 1))
        if self.ranges.separator is not None:
            seen = np.concatenate([seen, np.full((rows, 1), self.ranges.separator)], axis=1)
            places = np.concatenate([places, np.full((rows, 1), NO_PLACE)], axis=1)
        steps = Steps(seen, places, np.zeros(seen.shape, np.uint8))
        ends = self.returns + np.cumsum([space.size for _, space in images], dtype=np.int64)
        if images:
            steps.records[IMAGES], steps.ends[IMAGES] = np.stack(pictures, axis=1), ends
        if numbers:
            steps.records[VECTORS] = self._vectors(observations, numbers)
            steps.ends[VECTORS] = (ends[-1] if images else self.returns) + 1 + np.arange(self._vector_count)
        return steps

    def encode(
        self, observations: Values, actions: Values, learned: NDArray[np.bool_],
        returns: NDArray[np.float64] | None = None, hidden: bool = False,
    ) -> Steps:  # fmt: skip
        """Whole steps.

        Args:
            observations: of each step.
            actions: of each step.
            learned: whether a step's action is to be imitated `(steps,)`; the others are read and do not count.
            returns: to come `(steps,)`.
            hidden: whether the model may see the actions.
        """
        seen = self.observe(observations, returns)
        acted = self.action.encode(actions, self.ranges, action=True)
        counts = np.repeat(np.asarray(learned, np.uint8)[:, None], acted.shape[1], axis=1)
        return seen.followed_by(Steps(acted, self.action_places(acted.shape, hidden), counts))

    @staticmethod
    def action_places(shape: tuple[int, ...], hidden: bool) -> NDArray[np.int64]:
        """The places of action tokens."""
        return np.full(shape, HIDDEN if hidden else ACTION)

    def _vectors(self, observations: Values, numbers: Leaves) -> NDArray[np.float32]:
        """All numbers of each observation, padded with zeros, `(batch, vectors, modalities.vector)`."""
        parts = [cast(Box, space).numbers(lookup(observations, keys), self.ranges) for keys, space in numbers]
        joined, size, count = np.concatenate(parts, axis=1), self.ranges.modalities.vector, self._vector_count
        padded = np.pad(joined, ((0, 0), (0, count * size - joined.shape[1])))
        return padded.reshape(len(padded), count, size).astype(np.float32)


def join_records(parts: Sequence[tuple[dict[str, PlacedRecords], int]]) -> dict[str, PlacedRecords]:
    """The records of parts that follow one another, each with its number of tokens; a part may lack a name."""
    found: dict[str, list[PlacedRecords]] = {}
    begun = 0
    for records, tokens in parts:
        for name, placed in records.items():
            found.setdefault(name, []).append(placed.moved(begun))
        begun += tokens
    return {name: PlacedRecords.cat(pieces) for name, pieces in found.items()}


def returns_to_go(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of the rewards from each step on `(steps,)`."""
    return np.cumsum(rewards[::-1])[::-1]
