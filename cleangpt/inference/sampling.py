"""Which token comes next: from logits to a distribution, and from that to a token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from cleangpt.validation import Bounds, Checked, Count, CountOrZero, NonNegative, Positive

Probability = Annotated[float, Bounds(above=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How tokens are sampled; each restriction applies to what those before it have left."""

    temperature: NonNegative = 1.0
    """Sampling temperature; 0: greedy."""
    top_k: Count | None = None
    """Sample from the k most likely tokens (Fan et al. 2018)."""
    top_p: Probability | None = None
    """Nucleus sampling: sample from the fewest most likely tokens that together reach this probability (Holtzman et
    al. 2020)."""
    min_p: Probability | None = None
    """Drop tokens below min_p times the highest probability (Nguyen et al. 2024)."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of tokens in the context and multiplies negative ones; above 1, they become less likely
    (Keskar et al. 2019, "CTRL", section 4.1)."""
    seed: CountOrZero = 1337
    """Random seed for sampling; each row of a batch uses the next one."""


GREEDY = Sampling(temperature=0)


def distribution(logits: Tensor, sampling: Sampling, context: Tensor | None = None) -> Tensor:
    """The probabilities `(batch, vocab)`, float32, of the next token, summing to 1.

    Args:
        logits: `(batch, vocab)`.
        sampling: how to draw.
        context: which tokens are in each row's context `(batch, vocab)`, bool; for a repetition penalty.
    """
    logits = logits.float()
    if context is not None:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )  # fmt: skip
        logits = torch.where(context, penalised, logits)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        probabilities = _nucleus(probabilities, sampling.top_p)
    if sampling.min_p is not None:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that together reach `top_p`; the others have 0."""
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    # A token stays while those before it have not reached top_p, so the likeliest always stays.
    dropped = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter_(-1, ids, dropped), 0.0)


class SeededSampler:
    """Random numbers for each row of a batch, each from a generator of its own, on the host.

    So a row of a batch draws what it would draw alone; the global generators are left alone.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]

    def uniform(self) -> Tensor:
        """A number for each row `(batch,)`, float64, from 0 to below 1."""
        # Of 24 bits, so that its product with a sum does not round up to that sum.
        return torch.cat([torch.rand(1, generator=generator) for generator in self._generators]).double()

    def tokens(self, probabilities: Tensor) -> Tensor:
        """One token id for each row `(batch,)`, from probabilities `(batch, vocab)`, which need not sum to 1."""
        reached = probabilities.double().cumsum(dim=-1)
        drawn = self.uniform().to(reached.device)[:, None] * reached[:, -1:]
        # To the right of equal sums, so that a token of probability 0 is never drawn.
        # Probabilities that are no numbers give a place behind the last.
        return torch.searchsorted(reached, drawn, right=True)[:, 0].clamp(max=reached.shape[1] - 1)
