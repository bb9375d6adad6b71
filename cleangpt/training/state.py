"""The state of a run: every part of a snapshot, and the run's position."""

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Stateful(Protocol):
    """A part of a run that is saved in snapshots."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a snapshot: a tree of dicts, lists, numbers, strings and tensors."""

    def load_state_dict(self, state: Any) -> Any:
        """Restores `state_dict`."""


class TrainState:
    """Everything that a resumed run needs, listed once by name (design rule 5)."""

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self.parts = dict(parts)

    def state_dict(self) -> dict[str, Any]:
        """The state of every part; all processes call it together."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any], without: Collection[str] = ()) -> None:
        """Restores `state_dict`, except for the parts in `without`."""
        for name, part in self.parts.items():
            if name not in without:
                part.load_state_dict(state[name])

    def tensors(self) -> dict[str, Any]:
        """The large, sharded parts; a snapshot is read directly into their tensors."""
        return {name: self.parts[name].state_dict() for name in ("model", "optimizer")}


@dataclass(frozen=True)
class Length:
    """The length of a run and of its units."""

    batch_size: int
    """Samples in a batch, over all devices."""
    batches_per_macro_batch: int
    macro_batches: int

    @property
    def samples_per_macro_batch(self) -> int:
        """Samples in a macro-batch, over all devices."""
        return self.batch_size * self.batches_per_macro_batch


@dataclass
class Position:
    """The position of a run."""

    samples: int = 0
    """Samples trained on so far."""
    step: int = 0
    macro_batch: int = 0
    """Macro-batches finished: trained, validated and recorded."""
    time_trained: float = 0.0
    """Seconds, over all sessions of the run."""

    def __post_init__(self) -> None:
        self._clock = time.perf_counter()

    def start_clock(self) -> None:
        """Starts measuring time from now."""
        self._clock = time.perf_counter()

    def read_clock(self) -> float:
        """Adds the time since the clock was last read; returns `time_trained`."""
        now = time.perf_counter()
        self.time_trained += now - self._clock
        self._clock = now
        return self.time_trained

    def state_dict(self) -> dict[str, Any]:
        """The state for a snapshot."""
        self.read_clock()
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: an entry is not a number in its range.
        """
        set_numbers(self, state)


def set_numbers(target: object, state: Mapping[str, Any]) -> None:
    """Sets attributes that `target` has, after checking that each value is a number of the right type."""
    for name, value in state.items():
        kinds = (int,) if type(vars(target)[name]) is int else (int, float)
        if type(value) not in kinds or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}")
        setattr(target, name, value)
