"""Values of observations and actions as tokens, and back (Reed et al. 2022, "A generalist agent", section 2.1).

Numbers become uniform bins of [-1, 1], those without bounds after the μ-law; discrete values and booleans become ids;
dictionaries are flattened in lexicographic order of their keys. A space describes the values of one task; all of them
share the ids that `TokenRanges` gives out after those of the text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.pictures import resized
from cleangpt.errors import UserError
from cleangpt.validation import Bounds, Checked, Positive

Values = Any
"""A batch of values: an array whose first dimension is the batch, or a dict of such by key."""


def mu_law(values: NDArray[np.float64], mu: float = 100.0, largest: float = 256.0) -> NDArray[np.float64]:
    """sgn(x) log(|x| μ + 1) / log(M μ + 1), which takes ±M, `largest`, to ±1: Reed et al. 2022, appendix B."""
    compressed: NDArray[np.float64] = np.sign(values) * np.log1p(mu * np.abs(values)) / math.log1p(mu * largest)
    return compressed


def inverse_mu_law(values: NDArray[np.float64], mu: float = 100.0, largest: float = 256.0) -> NDArray[np.float64]:
    """The numbers that `mu_law` takes to `values`."""
    expanded: NDArray[np.float64] = np.sign(values) * np.expm1(np.abs(values) * math.log1p(mu * largest)) / mu
    return expanded


@dataclass(frozen=True, kw_only=True)
class Modalities(Checked, section="corpus.modalities"):
    """How values become tokens. The paper's own: `PAPER`, in which discrete values share the ids of text."""

    bins: Annotated[int, Bounds(2, 2**16)] = 1024
    """Bins of numbers."""
    mu: Positive = 100.0
    """μ of the μ-law, by which numbers without bounds are compressed."""
    largest: Positive = 256.0
    """M of the μ-law: the magnitude that becomes 1; larger ones are clipped."""
    scale: Literal["mu_law", "bounds", "none"] = "mu_law"
    """What brings the numbers of observations to [-1, 1]. mu_law: the μ-law; bounds: as those of actions, the bounds
    that the simulation gives them, where all of an array are finite; none: they are within already, others clipped."""
    choices: Annotated[int, Bounds(0, 2**16)] = 1024
    """Ids for discrete values and booleans."""
    choice_ids: Literal["own", "text"] = "own"
    """own: discrete values have ids of their own; text: those of the first text tokens, as in the paper."""
    action_bins: Literal["shared", "own"] = "shared"
    """shared: numbers of actions have the bins of observations; own: others."""
    separator: Literal["own", "none"] = "own"
    """own: a token of its own between an observation and its action; none: no token."""
    vector: Annotated[int, Bounds(0, 2**16)] = 0
    """All numbers of an observation are one vector of this size, padded with zeros, at one token (as in Gallouédec et
    al. 2024, "Jack of all trades"), or as many as they fill; discrete values stay tokens. 0: each number is a token, as
    in the paper."""
    image_height: Annotated[int, Bounds(1, 2**12)] = 64
    """Of the images that observations are resized to, in pixels; model.vision.height."""
    image_width: Annotated[int, Bounds(1, 2**12)] = 64
    """Of the same; model.vision.width."""
    image_tokens: Annotated[int, Bounds(1, 2**16)] = 16
    """Tokens that an image stands at, which follow from model.vision; with its defaults, 16."""


PAPER = Modalities(choice_ids="text")
"""The layout of Reed et al. 2022: with a text vocabulary of 32,000, numbers are the ids 32,000 to 33,023."""


@dataclass(frozen=True)
class TokenRanges:
    """Which ids stand for what: text first, then bins, bins of actions, discrete values, the separator."""

    text: int
    """Size of the text vocabulary."""
    modalities: Modalities = Modalities()

    @property
    def first_bin(self) -> int:
        """The lowest bin of observations."""
        return self.text

    @property
    def first_action_bin(self) -> int:
        """The lowest bin of actions."""
        return self.text + self.modalities.bins * (self.modalities.action_bins == "own")

    @property
    def first_choice(self) -> int:
        """The discrete value 0."""
        return 0 if self.modalities.choice_ids == "text" else self.first_action_bin + self.modalities.bins

    @property
    def choices(self) -> int:
        """Number of ids for discrete values."""
        shared = self.modalities.choice_ids == "text"
        return min(self.modalities.choices, self.text) if shared else self.modalities.choices

    @property
    def separator(self) -> int | None:
        """The token between observation and action."""
        return self.vocab_size - 1 if self.modalities.separator == "own" else None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        own = self.modalities.choices * (self.modalities.choice_ids == "own")
        return self.first_action_bin + self.modalities.bins + own + (self.modalities.separator == "own")

    def first_bin_of(self, action: bool) -> int:
        """The lowest bin of actions or of observations."""
        return self.first_action_bin if action else self.first_bin

    def bin_values(self) -> NDArray[np.float64]:
        """The number in [-1, 1] that each bin stands for, its centre `(bins,)`."""
        return (np.arange(self.modalities.bins) + 0.5) * 2 / self.modalities.bins - 1

    def to_bins(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """The bin of each number; what is outside of [-1, 1] is clipped, and 1 is in the last bin, not behind it."""
        bins = self.modalities.bins
        return np.clip(np.floor((np.clip(values, -1, 1) + 1) / 2 * bins), 0, bins - 1).astype(np.int64)


class Ids(NamedTuple):
    """The ids that one token of a value may have."""

    first: int
    end: int
    """The one after the last."""
    numeric: bool
    """Whether they are bins, neighbours of which are close to one another."""


class Space(Protocol):
    """The values of an observation or of an action; each is a fixed number of tokens."""

    @property
    def size(self) -> int:
        """Tokens of a value."""

    def encode(self, values: Values, ranges: TokenRanges, action: bool = False) -> NDArray[np.int64]:
        """Tokens `(batch, size)` of a batch of values.

        Raises:
            UserError: a value is not of this space.
        """

    def decode(self, tokens: NDArray[np.int64], ranges: TokenRanges, action: bool = False) -> Values:
        """The batch of values of tokens `(batch, size)`; of a bin, its centre."""

    def ids(self, ranges: TokenRanges, action: bool = False) -> list[Ids]:
        """The ids that each of the tokens may have."""

    def stack(self, values: Sequence[Any]) -> Values:
        """Single values as a batch."""


@dataclass(frozen=True)
class Box:
    """Arrays of numbers, in row-major order."""

    shape: tuple[int, ...]
    low: tuple[float, ...] | None = None
    """Smallest value of each number, which becomes -1; None: the μ-law is applied instead."""
    high: tuple[float, ...] | None = None
    """Largest value of each number, which becomes 1."""

    @property
    def size(self) -> int:
        """Numbers in an array."""
        return math.prod(self.shape)

    def encode(self, values: Values, ranges: TokenRanges, action: bool = False) -> NDArray[np.int64]:
        """The bin of each number, `(batch, size)`.

        Raises:
            UserError: a number is NaN, or there are more or fewer.
        """
        return ranges.first_bin_of(action) + ranges.to_bins(self.numbers(values, ranges))

    def numbers(self, values: Values, ranges: TokenRanges) -> NDArray[np.float64]:
        """The numbers of each array on the scale of the bins, clipped to [-1, 1], `(batch, size)`.

        Raises:
            UserError: as `encode`.
        """
        flat = _flat(np.asarray(values, np.float64))
        if flat.shape[1] != self.size:
            raise UserError(f"an array has {flat.shape[1]} numbers; allowed in this space: {self.size}")
        if np.isnan(flat).any():
            raise UserError("a number is NaN; allowed in observations and actions: any other")
        return np.clip(self.compress(flat, ranges), -1, 1)

    def decode(self, tokens: NDArray[np.int64], ranges: TokenRanges, action: bool = False) -> Values:
        """The number at the centre of each bin, `(batch, *shape)`, float64."""
        bins = np.clip(np.asarray(tokens) - ranges.first_bin_of(action), 0, ranges.modalities.bins - 1)
        return self.expand(ranges.bin_values()[bins], ranges).reshape(len(bins), *self.shape)

    def compress(self, numbers: NDArray[np.float64], ranges: TokenRanges) -> NDArray[np.float64]:
        """Numbers `(batch, size)` on the scale of the bins, on which those from -1 to 1 have one."""
        if self.low is None or self.high is None:
            return mu_law(numbers, ranges.modalities.mu, ranges.modalities.largest)
        low, high = np.array(self.low), np.array(self.high)
        scaled: NDArray[np.float64] = (numbers - low) / (high - low) * 2 - 1
        return scaled

    def expand(self, numbers: NDArray[np.float64], ranges: TokenRanges) -> NDArray[np.float64]:
        """The inverse of `compress`."""
        if self.low is None or self.high is None:
            return inverse_mu_law(numbers, ranges.modalities.mu, ranges.modalities.largest)
        low, high = np.array(self.low), np.array(self.high)
        scaled: NDArray[np.float64] = (numbers + 1) / 2 * (high - low) + low
        return scaled

    def ids(self, ranges: TokenRanges, action: bool = False) -> list[Ids]:
        """All bins, for every number."""
        first = ranges.first_bin_of(action)
        return [Ids(first, first + ranges.modalities.bins, numeric=True)] * self.size

    def stack(self, values: Sequence[Any]) -> Values:
        """`(batch, *shape)`, float64."""
        return np.array(values, np.float64).reshape(len(values), *self.shape)


@dataclass(frozen=True)
class Discrete:
    """Arrays of whole numbers, each below a count of its own; with shape () a single one."""

    counts: tuple[int, ...]
    """How many values each number has."""
    shape: tuple[int, ...] = ()
    start: tuple[int, ...] | None = None
    """Smallest value of each number; None: 0."""
    boolean: bool = False
    """Whether they are True and False."""

    @property
    def size(self) -> int:
        """Numbers in an array."""
        return math.prod(self.shape)

    def encode(self, values: Values, ranges: TokenRanges, action: bool = False) -> NDArray[np.int64]:
        """The id of each number, `(batch, size)`.

        Raises:
            UserError: a number is too small or too large, or there are more values than ids.
        """
        if max(self.counts) > ranges.choices:
            raise UserError(
                f"a discrete value has {max(self.counts):,} possibilities; allowed: {ranges.choices:,}, "
                "corpus.modalities.choices"
            )
        given = _flat(np.asarray(values))
        right = given.shape[1] == self.size
        flat = given.astype(np.int64) - (self._start if right else 0)
        if not right or ((flat < 0) | (flat >= np.array(self.counts))).any():
            raise UserError(
                f"the discrete values are {np.asarray(values).tolist()!r:.200}; allowed in this space: {self.size} "
                f"below {', '.join(map(str, self.counts[:8]))}"
            )
        return ranges.first_choice + flat

    def decode(self, tokens: NDArray[np.int64], ranges: TokenRanges, action: bool = False) -> Values:
        """Whole numbers `(batch, *shape)`, int64 or bool."""
        values = np.clip(np.asarray(tokens) - ranges.first_choice, 0, np.array(self.counts) - 1) + self._start
        return values.reshape(len(values), *self.shape).astype(bool if self.boolean else np.int64)

    def ids(self, ranges: TokenRanges, action: bool = False) -> list[Ids]:
        """As many as a number has values."""
        first = ranges.first_choice
        return [Ids(first, first + count, numeric=False) for count in self.counts]

    def stack(self, values: Sequence[Any]) -> Values:
        """`(batch, *shape)`, int64."""
        return np.array(values).reshape(len(values), *self.shape).astype(np.int64)

    @property
    def _start(self) -> NDArray[np.int64]:
        return np.zeros(self.size, np.int64) if self.start is None else np.array(self.start)


@dataclass(frozen=True)
class Image:
    """Pictures of any size, which become records of one size; the ids of the tokens that they stand at say nothing."""

    height: int
    width: int
    tokens: int
    """That a picture stands at."""

    @property
    def size(self) -> int:
        """The tokens of a picture."""
        return self.tokens

    def encode(self, values: Values, ranges: TokenRanges, action: bool = False) -> NDArray[np.int64]:
        """Zeros `(batch, tokens)`.

        Raises:
            UserError: it is a space of actions.
        """
        if action:
            self.ids(ranges)
        return np.zeros((len(values), self.tokens), np.int64)

    def decode(self, tokens: NDArray[np.int64], ranges: TokenRanges, action: bool = False) -> Values:
        """Raises UserError: tokens do not say what a picture shows."""
        return self.ids(ranges)

    def ids(self, ranges: TokenRanges, action: bool = False) -> list[Ids]:
        """Raises UserError likewise."""
        raise UserError("a space of actions has pictures; allowed: in observations")

    def stack(self, values: Sequence[Any]) -> Values:
        """Resized to `(batch, height, width, 3)`, uint8; grey becomes red, green and blue."""
        pictures = [resized(np.asarray(value, np.uint8), self.height, self.width) for value in values]
        return np.stack(pictures) if pictures else np.zeros((0, self.height, self.width, 3), np.uint8)


@dataclass(frozen=True)
class Dict:
    """Values by key, one after the other in lexicographic order of the keys."""

    parts: tuple[tuple[str, Space], ...]

    @property
    def ordered(self) -> list[tuple[str, Space]]:
        """The parts in the order of their tokens."""
        return sorted(self.parts, key=lambda part: part[0])

    @property
    def size(self) -> int:
        """Tokens of all parts."""
        return sum(space.size for _, space in self.parts)

    def encode(self, values: Values, ranges: TokenRanges, action: bool = False) -> NDArray[np.int64]:
        """The tokens of all parts, `(batch, size)`."""
        if missing := {key for key, _ in self.parts} - set(values):
            raise UserError(f"a dictionary has no {sorted(missing)[0]!r}; allowed: all keys of its space")
        return np.concatenate([space.encode(values[key], ranges, action) for key, space in self.ordered], axis=1)

    def decode(self, tokens: NDArray[np.int64], ranges: TokenRanges, action: bool = False) -> Values:
        """A dict of batches."""
        ends = np.cumsum([space.size for _, space in self.ordered])[:-1]
        parts = np.split(np.asarray(tokens), ends, axis=1)
        pairs = zip(self.ordered, parts, strict=True)
        return {key: space.decode(part, ranges, action) for (key, space), part in pairs}

    def ids(self, ranges: TokenRanges, action: bool = False) -> list[Ids]:
        """Those of all parts."""
        return [allowed for _, space in self.ordered for allowed in space.ids(ranges, action)]

    def stack(self, values: Sequence[Any]) -> Values:
        """A dict of batches."""
        return {key: space.stack([value[key] for value in values]) for key, space in self.parts}


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """`(batch, …)` to `(batch, size)`; the batch may be empty."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def leaves(space: Space, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Space]]:
    """The spaces in a space that are no dictionaries, in the order of their tokens, and the keys that lead to each."""
    if isinstance(space, Dict):
        return [leaf for key, part in space.ordered for leaf in leaves(part, (*keys, key))]
    return [(keys, space)]


def lookup(values: Values, keys: tuple[str, ...]) -> Values:
    """The values of a leaf.

    Raises:
        UserError: a key is missing.
    """
    for key in keys:
        if key not in values:
            raise UserError(f"a dictionary has no {key!r}; allowed: all keys of its space")
        values = values[key]
    return values


def batch_size(values: Values) -> int:
    """The number of values in a batch."""
    return batch_size(next(iter(values.values()))) if isinstance(values, dict) else len(values)


def take(values: Values, index: Any) -> Values:
    """Some values of a batch, by a slice or an array of indices."""
    if isinstance(values, dict):
        return {key: take(part, index) for key, part in values.items()}
    return np.asarray(values)[index]
