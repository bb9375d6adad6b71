"""How the margins of preferences are distributed: what a mean and a share of right ones do not tell."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cleangpt.data.loader import Samples, validation_batches
from cleangpt.evaluation.validate import validate
from cleangpt.files import write_json
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.pairs import PairObjective
from cleangpt.tracking.plots import histogram

MARGIN = "margin"
"""Name of the metric: by how much the chosen answer is ahead of the rejected one."""
MOST, BARS = 1000, 40
"""Pairs of each source, and bars of the histogram."""


def draw_margins(found: list[float], run: Path) -> None:
    """Draws a histogram of margins in RUN/plots/margins.png; its counts are in RUN/margins.json. Nothing of none."""
    if not found:
        return
    counts, edges = np.histogram(found, BARS)
    write_json(run / "margins.json", {"edges": edges.tolist(), "counts": counts.tolist()})
    histogram(
        edges.tolist(), counts.tolist(), MARGIN, f"Margins of {len(found):,} pairs", run / "plots" / "margins.png"
    )


def margins(
    model: LanguageModel, objective: PairObjective, samples: Iterable[Samples], device: torch.device,
    context: AbstractContextManager[Any],
) -> list[float]:  # fmt: skip
    """The margin of each pair, of at most 1,000 of each source.

    The objective gives sums over a batch, so each pair is a batch.
    """
    batches = (batch for part in samples for batch in validation_batches(part, 2, 2 * MOST))
    found = (validate(model, objective, [batch], device, context).get(MARGIN, np.nan) for batch in batches)
    return [margin for margin in found if np.isfinite(margin)]
