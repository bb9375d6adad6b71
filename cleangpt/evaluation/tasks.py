"""Task scores of a checkpoint."""

from collections.abc import Callable

import torch

from cleangpt.data.dataset import Split
from cleangpt.evaluation.exact_match import exact_match
from cleangpt.models.base import LanguageModel

Score = Callable[[LanguageModel, Split, int | None, torch.device], float]


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
}
"""Task scores by the name that a corpus gives in `task`: higher is better, from 0 to 1."""
