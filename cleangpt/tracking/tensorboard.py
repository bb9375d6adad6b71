"""Figures and samples for TensorBoard: event files in the run's folder `tensorboard`; needs cleangpt[tensorboard]."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes every figure as a scalar over macro-batches, samples and the experiment as text."""

    def __init__(self, experiment_json: dict[str, Any], run: Path) -> None:
        self._experiment, self._folder = experiment_json, run / FOLDER
        self._writer: Any = None

    def open(self, truncate_after: int | None) -> None:
        """Starts a new event file; readers drop what older ones say of macro-batches after `keep_until`."""
        from torch.utils.tensorboard import SummaryWriter

        purge = 0 if truncate_after is None else truncate_after + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        self._write_text("experiment", json.dumps(self._experiment, indent=2, ensure_ascii=False), purge)

    def record(self, figures: Mapping[str, float | int | None]) -> None:
        """Writes the figures that are known."""
        for name, value in figures.items():
            if value is not None and name != "macro_batch":
                self._writer.add_scalar(name, value, figures["macro_batch"])
        self._writer.flush()

    def sample(self, macro_batch: int, text: str) -> None:
        """Writes a text sampled from the model."""
        self._write_text("sample", text, macro_batch)

    def close(self, status: str) -> None:
        """Closes the event file."""
        self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a resumed run adds a file."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes nothing."""

    def _write_text(self, tag: str, text: str, macro_batch: int) -> None:
        # TensorBoard renders Markdown, in which an indented line stands as it is.
        self._writer.add_text(tag, "".join(f"    {line}\n" for line in text.split("\n")), macro_batch)
        self._writer.flush()
