"""How the margins of preferences are distributed: what a mean and a share of right ones do not tell."""

from pathlib import Path

import numpy as np
import torch

from cleangpt.data.loader import validation_batches
from cleangpt.data.mixing import MixedDataset, split_samples
from cleangpt.distributed.device import autocast, compute_dtype
from cleangpt.evaluation.validate import validate
from cleangpt.experiment import Experiment
from cleangpt.files import write_json
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.pairs import PairObjective
from cleangpt.tracking.plots import histogram

MARGIN = "margin"
"""Name of the metric: by how much the chosen answer is ahead of the rejected one."""
MOST, BARS = 1000, 40
"""Pairs of each source, and bars of the histogram."""


def draw_margins(
    model: LanguageModel, experiment: Experiment, dataset: MixedDataset, split: str, device: torch.device, run: Path
) -> None:
    """Draws a histogram of the margins of a split's pairs in RUN/plots/margins.png; its counts are in
    RUN/margins.json. Nothing for objectives that are not about pairs."""
    found = margins(model, experiment, dataset, split, device)
    if not found:
        return
    counts, edges = np.histogram(found, BARS)
    write_json(run / "margins.json", {"split": split, "edges": edges.tolist(), "counts": counts.tolist()})
    histogram(
        edges.tolist(), counts.tolist(), MARGIN, f"Margins of {len(found):,} pairs", run / "plots" / "margins.png"
    )


def margins(
    model: LanguageModel, experiment: Experiment, dataset: MixedDataset, split: str, device: torch.device
) -> list[float]:
    """The margin of each pair of a split, of at most 1,000 of each source; empty if the objective has none.

    The objective gives sums over a batch, so each pair is a batch.
    """
    objective = experiment.objective
    if not isinstance(objective, PairObjective):
        return []
    context = autocast(device, compute_dtype(device, experiment.training.precision))
    batches = (
        batch
        for part in split_samples(dataset, split, experiment.data.seq_len).values()
        for batch in validation_batches(part, 2, 2 * MOST)
    )
    found = (validate(model, objective, [batch], device, context).get(MARGIN, np.nan) for batch in batches)
    return [margin for margin in found if np.isfinite(margin)]
