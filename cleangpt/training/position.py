"""Where a run stands, and what it has summed up since the last macro-batch."""

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
        """What a run resumed within a macro-batch needs: the loss summed over all processes."""
        (loss,) = ranks.sum(self.sums[0].item())
        sums = torch.tensor([loss, self.sums[1].item()], dtype=self.sums.dtype)
        return {name: value for name, value in vars(self).items() if name != "device"} | {"sums": sums}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Goes on from `state_dict`; the main process takes the loss of all."""
        vars(self).update(state)
        self.sums = state["sums"].to(self.device)
        if not ranks.is_main:
            self.sums[0] = 0
