"""Metrics and samples for TensorBoard: event files in RUN/tensorboard; needs the package tensorboard.

Every metric is a scalar over steps. Losses are also logged over tokens, to compare runs of different batch size: with
the tag ``by_tokens/…``, in a separate folder, because a resumed run removes points by their x coordinate.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cleangpt.tracking.metrics import Value, step_tag, tag

FOLDER, BY_TOKENS = "tensorboard", "by_tokens"
LOSSES = ("train/loss", "val/loss")
AXES = ("step", "tokens")


class TensorBoardTracker:
    """Writes every metric as a scalar, samples and the experiment as text."""

    def __init__(self, experiment_json: dict[str, Any], run: Path) -> None:
        self._experiment, self._folder = experiment_json, run / FOLDER
        self._by_step: Any = None
        self._by_tokens: Any = None
        self._step = self._tokens = 0
        """Step and tokens of the last metrics written."""

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Starts new event files; readers drop later steps in older ones."""
        from torch.utils.tensorboard import SummaryWriter

        if self._by_step is not None:
            self.close("")
        first_step, first_token = (0, 0) if last_step is None else (last_step + 1, self._tokens + 1)
        self._by_step = SummaryWriter(str(self._folder), purge_step=first_step)
        self._by_tokens = SummaryWriter(str(self._folder / BY_TOKENS), purge_step=first_token)
        self._step = last_step or 0
        self._write_text("experiment", json.dumps(self._experiment, indent=2, ensure_ascii=False), first_step)

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Writes the known metrics of a macro-batch."""
        self._write({tag(name): value for name, value in metrics.items()})
        self._flush()

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Writes the known metrics of some steps."""
        for row in rows:
            self._write({step_tag(name): value for name, value in row.items()})
        self._flush()

    def sample(self, macro_batch: int, text: str) -> None:
        """Writes a text sampled from the model."""
        self._write_text("sample", text, self._step)

    def close(self, status: str) -> None:
        """Closes the event files."""
        self._by_step.close()
        self._by_tokens.close()

    def state_dict(self) -> dict[str, Any]:
        """The number of tokens at the last point."""
        return {"tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._tokens = state.get("tokens", 0)

    def _write(self, values: Mapping[str, Value]) -> None:
        """Writes one point of each tag, at the x coordinates ``step`` and ``tokens``."""
        self._step, self._tokens = int(values["step"] or 0), int(values["tokens"] or 0)
        known = {name: value for name, value in values.items() if value is not None and name not in AXES}
        losses = {f"{BY_TOKENS}/{name}": value for name, value in known.items() if name.startswith(LOSSES)}
        _add_scalars(self._by_step, known, self._step)
        _add_scalars(self._by_tokens, losses, self._tokens)

    def _write_text(self, name: str, text: str, step: int) -> None:
        # TensorBoard renders Markdown, in which an indented line is shown verbatim.
        self._by_step.add_text(name, "".join(f"    {line}\n" for line in text.split("\n")), step)
        self._flush()

    def _flush(self) -> None:
        self._by_step.flush()
        self._by_tokens.flush()


def _add_scalars(writer: Any, values: Mapping[str, float | int], step: int) -> None:
    """Writes scalars as one event; `add_scalar` would write one event each and take several times as long."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if values:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        writer.file_writer.add_summary(Summary(value=scalars), step)
