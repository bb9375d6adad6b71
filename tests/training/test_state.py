"""The sums of a macro-batch that was broken off go on in the same order, on as many processes or on others."""

import math
from typing import Any

import pytest
import torch

from cleangpt.distributed.processes import Ranks
from cleangpt.training.state import Meter

LOSSES = [0.1, 0.2, 0.3]
CPU = torch.device("cpu")


class Three(Ranks):
    """One of three processes whose losses are known."""

    def gather(self, value: Any) -> list[Any]:
        assert value == LOSSES[self.rank]
        return list(LOSSES)


def saved(rank: int) -> dict[str, Any]:
    meter = Meter(CPU)
    meter.sums += torch.tensor([LOSSES[rank], 7.0], dtype=torch.float64)
    meter.steps, meter.count = 4, 12.0
    return meter.state_dict(Three(rank=rank, world_size=3))


def resumed(state: dict[str, Any], ranks: Ranks) -> Meter:
    meter = Meter(CPU)
    meter.load_state_dict(state, ranks)
    assert (meter.steps, meter.count, meter.sums[1].item()) == (4, 12.0, 7.0)
    return meter


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_of_as_many_processes_goes_on_with_its_own_loss(rank: int) -> None:
    """Summed up by the main one, they were added in another order than in an unbroken run."""
    assert resumed(saved(0), Three(rank=rank, world_size=3)).sums[0].item() == LOSSES[rank]


def test_another_number_of_processes_has_the_same_sum() -> None:
    parts = [resumed(saved(2), Ranks(rank=rank, world_size=2)).sums[0].item() for rank in (0, 1)]
    assert parts == [math.fsum(LOSSES), 0.0]
    assert resumed(saved(1), Ranks()).sums[0].item() == math.fsum(LOSSES)


def test_a_state_without_the_parts_is_read() -> None:
    state = saved(1)
    del state["losses"]
    assert resumed(state, Ranks(rank=1, world_size=3)).sums[0].item() == 0.0
    assert resumed(state, Ranks(world_size=3)).sums[0].item() == LOSSES[1]
