"""Checkpoint to figures: loss, perplexity, bits per byte, task scores."""

from collections.abc import Callable

import torch
from torch import nn

from cleangpt.data.store import Split
from cleangpt.evaluation.exact_match import exact_match

Score = Callable[[nn.Module, Split, int | None, torch.device], float]

SCORES: dict[str, Score] = {
    "exact_match": exact_match,
}
"""Task scores by the name that a corpus gives in `task`: higher is better, from 0 to 1."""
