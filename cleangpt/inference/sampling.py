"""Sampling: from logits to a distribution, and from that to a token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.shuffle import mix, splitmix
from cleangpt.distributed.device import where_float64_is
from cleangpt.errors import UserError
from cleangpt.validation import Bounds, Checked, Count, CountOrZero, NonNegative, Positive

Probability = Annotated[float, Bounds(above=0, most=1)]
GREEDY_BELOW = 1e-5
"""Temperatures below this one are greedy decoding: the most probable token has practically all of the probability."""
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
NOT_FINITE = "the model's logits are not finite: it has diverged, or its weights are corrupt"


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How the next token is sampled; the settings are applied in this order."""

    temperature: NonNegative = 1.0
    """Sampling temperature; 0, or less than 0.00001: greedy decoding."""
    top_k: Count | None = None
    """Sample from the k most likely tokens (Fan et al. 2018); None: from all."""
    top_p: Probability | None = None
    """Nucleus sampling: sample from the smallest set of most likely tokens whose probabilities sum to p or more
    (Holtzman et al. 2020); None: off."""
    min_p: Probability | None = None
    """Drop tokens less likely than min_p times the most likely one (Nguyen et al. 2024); None: off."""
    repetition_penalty: Positive = 1.0
    """Penalize tokens already in the context: their positive logits are divided by it, negative ones multiplied
    (Keskar et al. 2019, "CTRL", section 4.1); 1: off."""
    seed: CountOrZero = field(default=1337, compare=False)
    """Random seed; rows of a batch have this seed and the following ones."""

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def plain(self) -> bool:
        """Whether every token may be sampled, with its probability under the model at this temperature."""
        return (self.top_k, self.top_p, self.min_p, self.repetition_penalty) == (None, None, None, 1)


GREEDY = Sampling(temperature=0)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio, odd: multiples of it are spread evenly."""


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The probabilities `(batch, vocab)`, float32, of the next token; they are finite where the logits are.

    Args:
        logits: `(batch, vocab)`.
        sampling: how to sample.
        seen: which tokens are in each row's context `(batch, vocab)`, bool; for a repetition penalty.
    """
    logits = penalize(logits.float(), sampling.repetition_penalty, seen)
    if sampling.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    if sampling.temperature != 1:  # differences to the largest one, which stay finite at small temperatures
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / min(sampling.temperature, LARGEST)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.plain:
        return probabilities
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    if sampling.min_p is not None:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def penalize(logits: Tensor, repetition_penalty: float, seen: Tensor | None) -> Tensor:
    """Applies the repetition penalty to the logits `(batch, vocab)` of `seen` tokens; None: no penalty.

    However large or small it is, they stay finite.
    """
    if seen is None:
        return logits
    factor = max(min(repetition_penalty, LARGEST), SMALLEST)
    penalized = torch.where(logits > 0, logits / factor, logits * factor).clamp(-LARGEST, LARGEST)
    return torch.where(seen, penalized, logits)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens that reaches `top_p`; all others get probability 0."""
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    # A token is kept if those before it have not reached top_p. The rounding of a large vocabulary's sum in float32 is
    # more than what its unlikely tokens have together; one rounding at its end lets 0.5 and 0.3 reach 0.8.
    exact = where_float64_is(ordered).double()
    before = (exact.cumsum(dim=-1) - exact) / exact.sum(dim=-1, keepdim=True)
    dropped = (before.float() >= top_p).to(ids.device)
    dropped[..., 0] = False  # where top_p is 0 in float32
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter_(-1, ids, dropped), 0.0)


def row_seed(seed: int) -> int:
    """A well-mixed 64-bit number from a seed, for `uniform`; so rows with neighboring seeds are unrelated."""
    return mix(seed)


def uniform(seeds: Sequence[int] | NDArray[np.uint64], indices: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """A random number in [0, 1) for each row `(batch,)`, float64 on the host: a function of its seed and index alone.

    A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") needs no state, and
    one call serves all rows.

    Args:
        seeds: from `row_seed`.
        indices: how many numbers the row has drawn before.
    """
    counters = np.array(seeds, dtype=np.uint64) + np.array(indices, dtype=np.uint64) * GOLDEN
    # 32 random bits, so that the product with a float64 sum does not round up to that sum.
    return torch.from_numpy((splitmix(counters) >> np.uint64(32)).astype(np.float64) * 2.0**-32)


def sample(probabilities: Tensor, draws: Tensor, *, checked: bool = True) -> Tensor:
    """A token for each row `(batch,)`, by inversion of its cumulative distribution.

    Args:
        probabilities: `(batch, vocab)`; they need not sum to 1.
        draws: a random number in [0, 1) for each row `(batch,)`.
        checked: whether to wait for the device and check that each row is a distribution; else a row that is none gets
            any token.

    Raises:
        UserError: a row is not a distribution, since logits are not finite.
    """
    cumulative = where_float64_is(probabilities).cumsum(dim=-1, dtype=torch.float64)
    if checked and not bool((cumulative[:, -1] > 0).all()):  # of NaN, too
        raise UserError(NOT_FINITE)
    threshold = draws.to(cumulative.device)[:, None] * cumulative[:, -1:]
    # right=True: a token of probability 0 is never sampled.
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return tokens.clamp(max=cumulative.shape[-1] - 1).to(probabilities.device)


def check_finite(logprobs: NDArray[Any]) -> None:
    """Raises UserError if the logits were not finite, so that no token can be sampled."""
    if np.isnan(logprobs).any():
        raise UserError(NOT_FINITE)
