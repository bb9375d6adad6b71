"""Rounds of what a policy does, and passes over them: what its sources have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.data.shuffle import mix, permute
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.config import RolloutConfig


@dataclass(frozen=True)
class Sizes:
    """How rounds divide into batches, steps and macro-batches."""

    batch_size: int
    """Answers in a batch, over all devices."""
    accumulation: int
    """Batches in a step."""
    rounds_per_macro_batch: int


def batch_of_round(
    rows: Mapping[str, Tensor], samples: int, config: RolloutConfig, sizes: Sizes, seed: int, ranks: Ranks,
    inputs: Sequence[str] = ("tokens",), records: Sequence[str] = (),
) -> Batch:  # fmt: skip
    """This device's part of the next batch of a round; every pass over the round has its own order of groups.

    The answers to a prompt stay together, so that a batch has few prompts, which `models/prompts.py` reads once each.

    Args:
        rows: the round's columns, `tokens` and other inputs `(rows, seq + 1)`; the others, `mask` among them, are
            aligned with the targets `(rows, seq)`.
        samples: consumed so far, over all devices.
        config: of the rollouts.
        sizes: how rounds divide.
        seed: of the orders.
        ranks: the processes.
        inputs: names of the columns that the model reads.
        records: names of its other inputs, images, vectors and their ends, whose first dimension is the rows.
    """
    answers, size = config.answers, sizes.batch_size
    number, place = divmod(samples, config.samples)
    pass_number, start = divmod(place, answers)
    part = size // ranks.world_size
    places = np.arange(start, start + size)[ranks.rank * part :][:part]
    groups, members = np.divmod(places, config.completions)
    order = permute(groups, config.prompts, mix(seed, number, pass_number))
    index = torch.from_numpy(order * config.completions + members)
    chosen = {name: column[index] for name, column in rows.items()}
    read = {name: chosen.pop(name).long() for name in inputs}
    targets = torch.where(chosen.pop("mask"), read["tokens"][:, 1:], IGNORED)
    fresh = float(place < size * sizes.accumulation)  # the first step's, with the weights that sampled them
    before = {name: column[:, :-1].contiguous() for name, column in read.items()}
    before |= {name: chosen.pop(name) for name in records}
    return Batch(before, targets, chosen | {"fresh": torch.full((part,), fresh)})


def means_of_rounds(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rounds that have it, under its name in training."""
    names = dict.fromkeys(name for metrics in rounds for name in metrics)
    return {f"train_{name}": float(np.mean([metrics[name] for metrics in rounds if name in metrics])) for name in names}


def read_position(state: Mapping[str, Any], name: str) -> int:
    """A position in a `state_dict`.

    Raises:
        ValueError: it is none.
    """
    position = state[name]
    if type(position) is not int or not 0 <= position < 2**63:
        raise ValueError(f"{name} is {position!r}")
    return position


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over the tokens of the mask; 0 if all returns are equal."""
    total = returns[mask].var(correction=0)
    return float(1 - (returns - values)[mask].var(correction=0) / total) if total > 0 else 0.0
