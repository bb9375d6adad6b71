"""The figures of a run: what each one means, and the two files that keep them.

    metrics.jsonl    one JSON object per macro-batch, keys as in `FIGURES`; the source of every plot
    samples.jsonl    {"macro_batch": …, "text": …} for each text sampled from the model

Both are strict JSON, one object per line, UTF-8. JSON has no NaN or infinity: such a figure is written as null, and
its line says which kind it was, as in ``{"val_loss": null, "not_finite": {"val_loss": "nan"}}``; `read_metrics` puts
it back. A line is on the disk before training goes on.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from cleangpt.errors import UserError, parsing
from cleangpt.files import check_regular, write_bytes

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
NOT_FINITE = "not_finite"
UNKNOWN = "–"
Value = float | int | None


@dataclass(frozen=True)
class Figure:
    """What one figure is called, in which unit it is kept, and what it means."""

    label: str
    unit: str
    meaning: str


FIGURES: dict[str, Figure] = {
    "macro_batch": Figure("macro-batch", "", "macro-batches finished"),
    "step": Figure("step", "steps", "optimizer updates so far, skipped ones included"),
    "samples": Figure("samples seen", "samples", "samples trained on so far"),
    "tokens": Figure("tokens seen", "tokens", "tokens trained on so far"),
    "train_loss": Figure("training loss", "nats", "mean cross-entropy per target token over the macro-batch"),
    "val_loss": Figure("validation loss", "nats", "mean cross-entropy per target token of the validation samples"),
    "perplexity": Figure("perplexity", "", "e to the power of the validation loss"),
    "bits_per_byte": Figure("bits per byte", "bits", "validation loss per byte of text, whatever the tokenizer"),
    "lr": Figure("learning rate", "", "learning rate of the last step"),
    "weight_decay": Figure("weight decay", "", "weight decay of the last step"),
    "training_batch_size": Figure("training batch size", "samples", "samples in a step, mean over the macro-batch"),
    "grad_norm": Figure("gradient norm", "", "norm of the whole gradient before clipping, mean over the macro-batch"),
    "visited_share": Figure("visited share", "share", "share of the training split seen at least once"),
    "times_visited": Figure("times visited", "epochs", "passes over the training split"),
    "tokens_per_second": Figure("tokens per second", "tokens/s", "tokens trained on per second, without validation"),
    "step_time": Figure("step time", "s", "mean time of a step"),
    "data_wait_share": Figure("data wait", "share", "share of the training time the slowest process waits for batches"),
    "mfu": Figure("MFU", "share", "model FLOPs utilisation: useful FLOPs against the peak of all devices"),
    "time_trained": Figure("time trained", "s", "time in this run, over all its resumptions"),
    "peak_memory": Figure("peak memory", "bytes", "largest memory in use so far by one process"),
    "skipped_steps": Figure("skipped steps", "steps", "steps skipped for a loss or gradient that is not finite"),
    "rollbacks": Figure("roll-backs", "", "times that a spike of the loss made the run go back"),
    "samples_left_out": Figure("samples left out", "samples", "samples passed over at spikes of the loss"),
    "exact_match": Figure("exact match", "share", "share of scored samples whose generated answer is right"),
}
"""Every figure of metrics.jsonl, by key; any other key is the score of a task.

Behind a slash stands the source of a mixture, of which alone the figure is: ``val_loss/code``.
"""

NO_SCORES = frozenset(FIGURES) - {"exact_match"}


def of_source(name: str, source: str) -> str:
    """The key of the figure `name` of one source of a mixture; `name` itself for the empty source, which is all."""
    return f"{name}/{source}" if source else name


def figure(name: str) -> Figure:
    """What is known of the figure `name`; the unit of a score that is not in FIGURES is ``score``."""
    kind, _, source = name.partition("/")
    known = FIGURES.get(kind, Figure(kind.replace("_", " "), "score", ""))
    return replace(known, label=f"{known.label}, {source}") if source else known


def scores(names: Mapping[str, Any]) -> list[str]:
    """The keys among `names` that are scores of a task."""
    return [name for name in names if name.partition("/")[0] not in NO_SCORES]


def label(name: str) -> str:
    """What the figure `name` is called."""
    return figure(name).label


def show(name: str, value: Value) -> str:
    """The figure `name` for a reader, in its unit: ``23.1 %``, ``1:02:03``, ``1.21M``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN if value is None else str(value)
    unit = figure(name).unit
    if unit in ("samples", "tokens", "tokens/s", "steps"):
        return show_count(value)
    if unit == "bytes":
        return show_bytes(value)
    if unit == "s":
        return show_time(value)
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if unit in ("nats", "bits") else f"{value:.4g}"


def show_count(value: float) -> str:
    """A count with three figures from ten thousand on: ``9,999``, ``12.3k``, ``1.21M``."""
    if abs(value) < 10_000:
        return f"{round(value):,}"
    power = min(int((math.log10(abs(value)) + 1e-9) / 3), 5)
    return f"{value / 1000**power:.3g}{' kMGTP'[power]}" if abs(value) < 999.5e15 else f"{value:.3g}"


def show_bytes(value: float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more: ``812 MiB``."""
    power = min(max(int(value).bit_length() - 1, 0) // 10, 5)
    return f"{value / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def show_time(seconds: float) -> str:
    """Seconds as ``12 ms``, ``3.4 s`` or, from a minute on, hours, minutes and seconds."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class MetricsFiles:
    """The tracker behind metrics.jsonl and samples.jsonl in the folder `run`.

    Lines that a full disk refuses wait, in memory and in the snapshots, and are written in order when there is room;
    `say` is told.
    """

    def __init__(self, run: Path, log: Callable[[str], None] = lambda text: None) -> None:
        self._run, self._say = run, log
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._told = False

    def open(self, truncate_after: int | None) -> None:
        """Removes the lines of macro-batches after `keep_until`, all of them if it is None, and a torn last line."""
        for name in (METRICS, SAMPLES):
            _keep_lines(self._run / name, truncate_after)
            there = {entry["macro_batch"] for entry in _read_lines(self._run / name)}
            self._waiting = [(of, line) for of, line in self._waiting if of != name or line["macro_batch"] not in there]
        self._write()

    def record(self, figures: Mapping[str, Value]) -> None:
        """Appends the figures of one macro-batch."""
        self._waiting.append((METRICS, strict(figures)))
        self._write()

    def sample(self, macro_batch: int, text: str) -> None:
        """Appends a text that the model wrote after `macro_batch`."""
        self._waiting.append((SAMPLES, {"macro_batch": macro_batch, "text": text}))
        self._write()

    def close(self, status: str) -> None:
        """Says what could not be written to the end."""
        self._write()
        for name in sorted({name for name, _ in self._waiting}):
            numbers = [str(line["macro_batch"]) for of, line in self._waiting if of == name]
            self._say(f"{name} lacks macro-batch {', '.join(numbers)}; resume writes what the last snapshot has of it")

    def state_dict(self) -> dict[str, Any]:
        """The lines that wait."""
        return {"waiting": [list(entry) for entry in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned; before `open`."""
        self._waiting = [(name, line) for name, line in state.get("waiting", [])]

    def _write(self) -> None:
        while self._waiting:
            name, line = self._waiting[0]
            try:
                _append(self._run / name, line)
            except OSError as error:
                if not self._told:
                    self._say(f"{name} cannot be written: {error}; training goes on, and lines wait until it can")
                self._told = True
                return
            del self._waiting[0]
        if self._told:
            self._say("every line that waited is written")
        self._told = False


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The figures of every macro-batch of a run, in order; an empty list before the first one.

    Raises:
        UserError: a line other than a torn last one is not a JSON object, or has something else than numbers.
    """
    rows = _read_lines(run / METRICS)
    for number, row in enumerate(rows, start=1):
        with parsing(f"{run / METRICS}, line {number},"):
            row.update({name: float(kind) for name, kind in row.pop(NOT_FINITE, {}).items()})
            for name, value in row.items():
                if type(value) not in (int, float, NoneType):
                    raise ValueError(f"{name} is {value!r}")
                row[name] = value if value is None or abs(value) < 2**1000 else float(value)
    return rows


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The texts sampled during a run, each with its `macro_batch`, in order; see `read_metrics`."""
    return _read_lines(run / SAMPLES)


def strict(figures: Mapping[str, Value]) -> dict[str, Any]:
    """The figures with null for NaN and infinity, and under `not_finite` which of them those were."""
    odd = {name: str(value) for name, value in figures.items() if value is not None and not math.isfinite(value)}
    return {name: None if name in odd else value for name, value in figures.items()} | (
        {NOT_FINITE: odd} if odd else {}
    )


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Appends one line and waits until it is on the disk; a lone surrogate, which UTF-8 lacks, becomes ``?``.

    Raises:
        OSError: it could not be written, and nothing of it is there.
    """
    line = (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        end = os.fstat(file.fileno()).st_size
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file, without the torn one that a crash may have left at its end."""
    if not path.exists():
        return []
    check_regular(path)
    return path.read_bytes().split(b"\n")[:-1]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}, is not a JSON object; mend or remove the line") from None
        entries.append(entry)
    return entries


def _keep_lines(path: Path, truncate_after: int | None) -> None:
    if not path.exists():
        return
    entries = zip(_lines(path), _read_lines(path), strict=True)
    with parsing(path):
        kept = b"".join(
            line + b"\n"
            for line, entry in entries
            if truncate_after is not None and entry["macro_batch"] <= truncate_after
        )
    if len(kept) != path.stat().st_size:
        write_bytes(path, kept)
