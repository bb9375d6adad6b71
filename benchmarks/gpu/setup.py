"""What every row gets. Imports PyTorch only when asked for the device, so that a row process starts quickly."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PROJECT = Path(__file__).parents[2]


class LeftOut(Exception):  # noqa: N818 - not an error
    """Raised by a row that cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Setup:
    """What every row gets."""

    folder: Path
    """Folder for temporary files of this row, empty at the start."""
    results: Path
    """The journal of results, `journal.py`."""
    card: str
    """The name of the device, under which results are recorded."""
    toy: bool = False
    """On the CPU at toy size, to see that every row works; the numbers mean nothing."""
    peer: Path | None = None
    """A checkout of nanoGPT."""
    text: Path | None = None
    """Tiny Shakespeare."""

    @property
    def device(self) -> "torch.device":
        """The device to measure."""
        import torch

        return torch.device("cpu" if self.toy else "cuda")

    def size(self, real: T, toy: T) -> T:
        """`real`, or `toy` in a toy run."""
        return toy if self.toy else real

    def to_json(self) -> str:
        """For the command line of a row process."""
        return json.dumps(
            {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        )

    @staticmethod
    def from_json(text: str) -> "Setup":
        """The inverse of `to_json`."""
        entries: dict[str, Any] = json.loads(text)
        paths = {name: Path(entries[name]) for name in ("folder", "results", "peer", "text") if entries[name]}
        return Setup(**{**entries, **paths})


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    what: str
    value: float | None = None
    """None: it could not be measured, and the note says why."""
    unit: str = ""
    least: float | None = None
    """Goal: at least this; None: no such goal."""
    most: float | None = None
    """Goal: at most this; None: no such goal."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None: there is none, or no value."""
        if self.value is None or (self.least is None and self.most is None):
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def to_json(self) -> dict[str, Any]:
        """As in the journal."""
        return asdict(self)
