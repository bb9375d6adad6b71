"""Where a run stands, and what it has summed up since the last macro-batch."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cleangpt.distributed.processes import Ranks


@dataclass
class Position:
    """Where a run stands."""

    samples: int = 0
    """Trained on so far: with `left_out`, the data's whole state."""
    step: int = 0
    macro_batch: int = 0
    """Finished ones: trained, validated and recorded."""
    time_trained: float = 0.0
    """Seconds, over all processes of the run."""
    skipped_ranges: list[list[int]] = field(default_factory=list)
    """Ranges of the data, first and one after the last, passed over at spikes of the loss; not among `samples`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; raises ValueError for what is none."""
        _take_numbers(self, {name: value for name, value in state.items() if name != "skipped_ranges"})
        ranges: list[list[int]] = state.get("skipped_ranges", [])
        if any(type(end) is not int or not 0 <= end < 2**63 for first, last in ranges for end in (first, last)):
            raise ValueError(f"left_out is {ranges!r}")
        self.skipped_ranges = [[first, last] for first, last in ranges]


class Meter:
    """Sums over the macro-batch in progress. The loss stays on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device = device
        self.sums = torch.zeros(2, dtype=dtype, device=device)
        """Of the loss over this process's targets and of the gradient norm over steps."""
        self.targets = 0.0
        self.steps = self.samples = 0
        self.seconds = self.waited = 0.0
        self.lr = self.weight_decay = 0.0
        """Of the last step."""

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """What a run resumed within a macro-batch needs: the loss of each process, in whose order they are added."""
        own = {name: value for name, value in vars(self).items() if name != "device"}
        return own | {"sums": self.sums.cpu(), "losses": ranks.gather(self.sums[0].item())}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Goes on from `state_dict`; where the number of processes is another, the main one takes the loss of all.

        Raises:
            ValueError: it is none.
        """
        sums: torch.Tensor = state["sums"]
        losses: list[float] = state.get("losses", [sums[0].item()])
        _take_numbers(self, {name: value for name, value in state.items() if name not in ("sums", "losses")})
        self.sums = sums.to(self.device, self.sums.dtype, copy=True).reshape(2)
        same = len(losses) == ranks.world_size
        self.sums[0] = losses[ranks.rank] if same else math.fsum(losses) * ranks.is_main


def _take_numbers(target: object, state: dict[str, Any]) -> None:
    """Sets attributes that `target` has, each to a number that may be one of its values."""
    for name, value in state.items():
        kinds = (int,) if type(vars(target)[name]) is int else (int, float)
        if type(value) not in kinds or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}")
        setattr(target, name, value)
