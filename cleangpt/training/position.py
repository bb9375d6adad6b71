"""Where a run stands, and what it has summed up since the last macro-batch."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cleangpt.training.ranks import Ranks


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
    left_out: list[list[int]] = field(default_factory=list)
    """Ranges of the data, first and one after the last, passed over at spikes of the loss; not among `samples`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        vars(self).update(state)


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
        """Goes on from `state_dict`; where the number of processes is another, the main one takes the loss of all."""
        losses: list[float] = state.get("losses", [state["sums"][0].item()])
        vars(self).update({name: value for name, value in state.items() if name != "losses"})
        self.sums = state["sums"].to(self.device, copy=True)
        same = len(losses) == ranks.world_size
        self.sums[0] = losses[ranks.rank] if same else math.fsum(losses) * ranks.is_main
