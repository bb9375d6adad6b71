"""The metrics of a run: their meaning, and the files that contain them.

    metrics.jsonl    one JSON object per macro-batch, keys as in `METRICS`
    steps.jsonl      one JSON object every `tracking.every` steps, keys as in `STEP_METRICS`
    samples.jsonl    {"macro_batch": …, "text": …} for each text sampled from the model
    answers.jsonl    with `rollouts.save_answers` one JSON object per answer; "step" is the first that learns from it

All are strict JSON, one object per line, UTF-8. JSON has no NaN or infinity: such a value is written as null, with its
kind as in ``{"val_loss": null, "not_finite": {"val_loss": "nan"}}``; `read_metrics` and `read_steps` restore it. Before
a snapshot is complete, all lines up to it are on disk or, if the disk is full, in the snapshot.
"""

import itertools
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from cleangpt.errors import UserError, parsing
from cleangpt.files import check_regular, fsync_file, write_bytes
from cleangpt.tracking.numbers import show_bytes, show_count, show_number, show_time
from cleangpt.tracking.rollouts import ROLLOUTS

METRICS_FILE, STEPS_FILE, SAMPLES_FILE = "metrics.jsonl", "steps.jsonl", "samples.jsonl"
ANSWERS_FILE = "answers.jsonl"
LINE_NUMBERS = {METRICS_FILE: "macro_batch", STEPS_FILE: "step", SAMPLES_FILE: "macro_batch", ANSWERS_FILE: "step"}
"""The key that orders the lines of each file."""
NOT_FINITE = "not_finite"
UNKNOWN = "–"
Value = float | int | None


@dataclass(frozen=True)
class Metric:
    """Label, unit and meaning of one metric, and its tag in Weights & Biases and TensorBoard."""

    label: str
    unit: str
    meaning: str
    tag: str


METRICS: dict[str, Metric] = {
    "macro_batch": Metric("macro-batch", "", "macro-batches finished", "macro_batch"),
    "step": Metric("step", "steps", "optimizer steps so far, including skipped ones", "step"),
    "samples": Metric("samples seen", "samples", "samples trained on so far", "data/samples"),
    "tokens": Metric("tokens seen", "tokens", "tokens trained on so far", "tokens"),
    "train_loss": Metric(
        "training loss", "nats", "mean cross-entropy per target token over the macro-batch", "macro_batch/train_loss"
    ),
    "val_loss": Metric(
        "validation loss", "nats", "mean cross-entropy per target token on the validation samples", "val/loss"
    ),
    "perplexity": Metric("perplexity", "", "e to the power of the validation loss", "val/perplexity"),
    "bits_per_byte": Metric(
        "bits per byte", "bits", "validation loss per byte of text, comparable across tokenizers", "val/bits_per_byte"
    ),
    "lr": Metric("learning rate", "", "learning rate of the last step", "macro_batch/lr"),
    "weight_decay": Metric("weight decay", "", "weight decay of the last step", "macro_batch/weight_decay"),
    "training_batch_size": Metric(
        "training batch size", "samples", "samples per step, mean over the macro-batch", "macro_batch/batch_size"
    ),
    "grad_norm": Metric(
        "gradient norm", "", "global gradient norm before clipping, mean over the macro-batch", "macro_batch/grad_norm"
    ),
    "visited_share": Metric(
        "visited share", "share", "share of the training split seen at least once", "data/visited_share"
    ),
    "times_visited": Metric("times visited", "epochs", "passes over the training split", "data/times_visited"),
    "tokens_per_second": Metric(
        "tokens per second", "tokens/s", "tokens trained on per second of training", "macro_batch/tokens_per_second"
    ),
    "step_time": Metric("step time", "s", "mean time of a step", "speed/step_time"),
    "data_wait_share": Metric(
        "data wait", "share", "share of training time that the slowest process waits for data", "speed/data_wait_share"
    ),
    "mfu": Metric("MFU", "share", "model FLOPs utilization: useful FLOPs over the peak of all devices", "speed/mfu"),
    "time_trained": Metric(
        "time trained", "s", "wall-clock time of the run over all its sessions", "speed/time_trained"
    ),
    "peak_memory": Metric("peak memory", "bytes", "peak memory of any one process so far", "system/peak_memory"),
    "skipped_steps": Metric(
        "skipped steps", "steps", "steps skipped because of a non-finite loss or gradient", "train/skipped_steps"
    ),
    "rollbacks": Metric("roll-backs", "", "times the run returned to a snapshot after a loss spike", "train/rollbacks"),
    "samples_left_out": Metric(
        "samples left out", "samples", "samples skipped after loss spikes", "data/samples_left_out"
    ),
    "exact_match": Metric(
        "exact match", "share", "share of scored samples answered exactly right", "tasks/exact_match"
    ),
} | {f"train_{name}": Metric(*words, f"rollout/{name}") for name, words in ROLLOUTS.items()}
"""The metrics in metrics.jsonl; besides these, ``train_NAME`` and ``val_NAME`` are the objective's metric NAME, and any
other key is a task score.

A slash is followed by the source of a mixture: ``val_loss/code``.
"""

STEP_METRICS: dict[str, Metric] = {
    "step": METRICS["step"],
    "samples": METRICS["samples"],
    "tokens": METRICS["tokens"],
    "loss": Metric("training loss", "nats", "mean cross-entropy per target token of the step", "train/loss"),
    "lr": Metric("learning rate", "", "learning rate of the step", "train/lr"),
    "weight_decay": Metric("weight decay", "", "weight decay of the step", "train/weight_decay"),
    "grad_norm": Metric("gradient norm", "", "global gradient norm before clipping", "train/grad_norm"),
    "tokens_per_second": Metric(
        "tokens per second", "tokens/s", "tokens trained on per second since the last row", "speed/tokens_per_second"
    ),
    "batch_size": Metric("batch size", "samples", "samples in the step, over all devices", "train/batch_size"),
    "skipped": Metric("skipped", "", "1 if the update was skipped for a non-finite gradient", "train/skipped"),
}
"""The metrics in steps.jsonl; any other key is a metric of the objective."""

NOT_SCORES = frozenset(METRICS) - {"exact_match"}
SPLITS = {"train": "training", "val": "validation"}


def metric_key(name: str, source: str) -> str:
    """The key of metric `name` for one source of a mixture; `name` itself for the empty source, the whole mixture."""
    return f"{name}/{source}" if source else name


def metric(name: str) -> Metric:
    """Label, unit, meaning and tag of a metric in metrics.jsonl, or of one that is only in steps.jsonl."""
    kind, _, source = name.partition("/")
    known = METRICS.get(kind) or STEP_METRICS.get(kind) or _unlisted(kind)
    return replace(known, label=f"{known.label}, {source}", tag=f"{known.tag}/{source}") if source else known


def _unlisted(name: str) -> Metric:
    """A metric of the objective, or a task score."""
    split, _, rest = name.partition("_")
    if split not in SPLITS or not rest:
        return Metric(name.replace("_", " "), "", "", f"tasks/{name}")
    # Over steps, the objective's metric has the tag train/NAME.
    tag = f"val/{rest}" if split == "val" else f"macro_batch/{name}"
    return Metric(f"{SPLITS[split]} {rest.replace('_', ' ')}", "", "", tag)


def tag(name: str) -> str:
    """Tag of a metric in metrics.jsonl for Weights & Biases and TensorBoard: ``val/loss``."""
    return metric(name).tag


def step_tag(name: str) -> str:
    """Tag of a metric in steps.jsonl for Weights & Biases and TensorBoard: ``train/loss``."""
    return STEP_METRICS[name].tag if name in STEP_METRICS else f"train/{name}"


def scores(names: Iterable[str]) -> list[str]:
    """The `names` that are task scores in metrics.jsonl."""
    return [name for name in names if name.partition("/")[0] not in NOT_SCORES and not is_objective_metric(name)]


def is_objective_metric(name: str) -> bool:
    """Whether a key in metrics.jsonl is an objective's own metric, ``train_NAME`` or ``val_NAME``."""
    return name.partition("/")[0] not in METRICS and name.startswith(tuple(f"{split}_" for split in SPLITS))


def label(name: str) -> str:
    """Label of the metric `name`."""
    return metric(name).label


def show(name: str, value: Value) -> str:
    """The value of metric `name` in its unit, for display: ``23.1 %``, ``1:02:03``, ``1.21M``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN if value is None else str(value)
    unit = metric(name).unit
    if unit in ("samples", "tokens", "tokens/s", "steps"):
        return show_count(value)
    if unit == "bytes":
        return show_bytes(value)
    if unit == "s":
        return show_time(value)
    if unit == "share":
        return f"{show_number(100 * value, 1)} %"
    return show_number(value, 4) if unit in ("nats", "bits") else f"{value:.4g}"


class MetricsFiles:
    """The tracker that writes metrics.jsonl, steps.jsonl, samples.jsonl and answers.jsonl in the folder `run`.

    On a full disk, lines are kept in memory and in the snapshots, and written in order as soon as there is room; `log`
    is called with a message.
    """

    def __init__(self, run: Path, log: Callable[[str], None] = lambda text: None) -> None:
        self._run, self._log = run, log
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._warned = False

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Removes the lines after macro-batch `truncate_after` and step `last_step`, which the run will write again.

        None removes all lines; a torn last line is always removed.
        """
        lasts = {name: last_step if key == "step" else truncate_after for name, key in LINE_NUMBERS.items()}
        # All are read before one is written: a corrupt line refuses the run, which stays as it was.
        kept = {name: _lines_to_keep(self._run / name, LINE_NUMBERS[name], last) for name, last in lasts.items()}
        for name, (content, written) in kept.items():
            if (path := self._run / name).exists() and len(content) != path.stat().st_size:
                write_bytes(path, content)
            self._waiting = [
                (file, line) for file, line in self._waiting if file != name or line[LINE_NUMBERS[name]] > written
            ]
        self._write()

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Appends the metrics of one macro-batch; they are on disk when this returns."""
        self._waiting.append((METRICS_FILE, strict(metrics)))
        self._write()

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Appends the metrics of some steps; `state_dict` waits until they are on disk."""
        self._waiting.extend((STEPS_FILE, strict(row)) for row in rows)
        self._write()

    def sample(self, macro_batch: int, text: str) -> None:
        """Appends a text sampled from the model after `macro_batch`."""
        self._waiting.append((SAMPLES_FILE, {"macro_batch": macro_batch, "text": text}))
        self._write()

    def answers(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends the answers of a round of rollouts."""
        self._waiting.extend((ANSWERS_FILE, strict(line)) for line in lines)
        self._write()

    def close(self, status: str) -> None:
        """Tries once more to write the pending lines; logs those that could not be written."""
        self._write()
        for name, key in LINE_NUMBERS.items():
            missing = [line[key] for file, line in self._waiting if file == name]
            if not missing:
                continue
            listed = ", ".join(map(str, missing)) if len(missing) < 10 else f"{missing[0]} to {missing[-1]}"
            self._log(
                f"{name} lacks {key.replace('_', '-')} {listed}; resume writes those that the last snapshot holds"
            )

    def state_dict(self) -> dict[str, Any]:
        """The pending lines; all others are on disk."""
        try:
            if (self._run / STEPS_FILE).exists():
                fsync_file(self._run / STEPS_FILE)
        except OSError as error:
            self._log(f"{STEPS_FILE} could not be flushed to the disk: {error}")
        return {"waiting": [list(entry) for entry in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; to be called before `open`."""
        self._waiting = [(name, line) for name, line in state.get("waiting", [])]

    def _write(self) -> None:
        while self._waiting:
            name, entries = next(itertools.groupby(self._waiting, key=operator.itemgetter(0)))
            lines = [line for _, line in entries]
            try:
                _append(self._run / name, lines, sync=name != STEPS_FILE)
            except OSError as error:
                if not self._warned:
                    self._log(f"{name} cannot be written: {error}; training continues, lines wait until there is room")
                self._warned = True
                return
            del self._waiting[: len(lines)]
        if self._warned:
            self._log("all waiting lines have been written")
        self._warned = False


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of every macro-batch of a run, in order; an empty list before the first.

    Raises:
        UserError: a line other than a torn last one is not a JSON object, or holds anything but numbers.
    """
    return _read_numbers(run / METRICS_FILE)


def read_steps(run: Path) -> list[dict[str, Any]]:
    """The metrics by step of a run, in order; an empty list if it has none. Raises as `read_metrics`."""
    return _read_numbers(run / STEPS_FILE)


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The texts sampled during a run, each with its `macro_batch`, in order. Raises as `read_metrics`."""
    return _read_lines(run / SAMPLES_FILE)


def strict(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with null for NaN and infinity, and `not_finite` with the kind of each."""
    odd = {name: str(value) for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**metrics, **dict.fromkeys(odd), NOT_FINITE: odd} if odd else dict(metrics)


def restored(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `strict`."""
    known = {name: value for name, value in metrics.items() if name != NOT_FINITE}
    return known | {name: float(kind) for name, kind in metrics.get(NOT_FINITE, {}).items()}


def _append(path: Path, entries: Sequence[dict[str, Any]], sync: bool) -> None:
    """Appends lines, fsyncing them with `sync`; a lone surrogate, which is invalid in UTF-8, becomes ``?``.

    Raises:
        OSError: they could not be written; the file is unchanged.
    """
    text = "".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)
    left = memoryview(text.encode("utf-8", "replace"))
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        end = os.fstat(file.fileno()).st_size
        try:
            while left:
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _lines(path: Path) -> list[bytes]:
    """The complete lines of a file, without the torn one that a crash may have left at its end."""
    if not path.exists():
        return []
    check_regular(path)
    return path.read_bytes().split(b"\n")[:-1]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [_parse(path, number, line) for number, line in enumerate(_lines(path), start=1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{path}, line {number}, is not a JSON object; fix or remove the line") from None
    return entry


def _read_numbers(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_lines(path), start=1):
        with parsing(f"{path}, line {number},"):
            rows.append(row := restored(line))
            for name, value in row.items():
                if type(value) not in (int, float, NoneType):
                    raise ValueError(f"{name} is {value!r}")
                row[name] = value if value is None or abs(value) < 2**1000 else float(value)
    return rows


def _lines_to_keep(path: Path, key: str, last: int | None) -> tuple[bytes, int]:
    """The lines of a file up to the first whose `key` is above `last`, none if that is None.

    Returns:
        The lines, and the `key` of the last one; -1 if there is none.

    Raises:
        UserError: a line to be kept is corrupt. In steps.jsonl, whose lines are only synced in batches, a power failure
            may have corrupted those after the snapshot: there, the file is truncated at the corrupt line.
    """
    kept, newest = [], -1
    for number, line in enumerate([] if last is None else _lines(path), start=1):
        try:
            with parsing(path):
                found = int(_parse(path, number, line)[key])
        except UserError:
            if path.name == STEPS_FILE:
                break
            raise
        if last is None or found > last:
            break
        kept.append(line + b"\n")
        newest = found
    return b"".join(kept), newest
