"""The metrics that a run records: a row every few steps, and one after each macro-batch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cleangpt.data.source import BatchSource
from cleangpt.distributed.device import peak_memory
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError, nearest
from cleangpt.tracking import Trackers
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.meter import Meter, StepResult, combine, mean
from cleangpt.training.state import Position

FLUSH = 64
"""Number of rows that are read from the device together."""
Row = Mapping[str, float | int | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Throughput:
    """Computes tokens per second and MFU, the share of the devices' peak FLOP/s."""

    seq_len: int
    flops_per_token: int
    peak_flops: float | None
    """Peak FLOP/s of one device; None: unknown."""
    devices: int

    def metrics(self, samples: int, seconds: float) -> dict[str, float | None]:
        """Tokens per second and MFU of training on `samples` in `seconds`, over all devices."""
        rate = samples * self.seq_len / seconds
        flops = rate * self.flops_per_token / self.devices
        return {"tokens_per_second": rate, "mfu": flops / self.peak_flops if self.peak_flops else None}


class StepLog:
    """Rows of steps.jsonl: kept on the device and read together, so that no step waits for them.

    Every process adds and flushes at the same steps; only the main process's trackers write.
    """

    def __init__(self, every: int, seq_len: int, trackers: Trackers, ranks: Ranks) -> None:
        self.every, self.seq_len, self.trackers, self.ranks = every, seq_len, trackers, ranks
        self._points: list[tuple[dict[str, float | int], StepResult]] = []
        self._since, self._samples = time.perf_counter(), 0

    def add(self, position: Position, step: StepResult) -> None:
        """Adds the step that ended at `position`."""
        self._samples += step.samples
        if position.step % self.every:
            return
        now = time.perf_counter()
        rate = self._samples * self.seq_len / max(now - self._since, 1e-9)
        self._since, self._samples = now, 0
        row: dict[str, float | int] = {
            "step": position.step, "samples": position.samples, "tokens": position.samples * self.seq_len,
            "lr": step.lr, "weight_decay": step.weight_decay, "batch_size": step.samples, "tokens_per_second": rate,
        }  # fmt: skip
        self._points.append((row, step))
        if len(self._points) >= FLUSH:
            self.flush()

    def restart_clock(self) -> None:
        """Excludes the time since the last row, such as validation, from the speed."""
        self._since, self._samples = time.perf_counter(), 0

    def flush(self) -> None:
        """Reads the rows from the device and passes them to the trackers; all processes together."""
        points, self._points = self._points, []
        if not points:
            return
        names = sorted({name for _, step in points for name in step.metrics})
        zero = torch.zeros_like(points[0][1].loss)
        table = torch.stack([self._numbers(step, names, zero) for _, step in points]).tolist()
        rows = []
        for (row, step), own, *tables in zip(points, table, *self.ranks.all_gather(table), strict=True):
            _, _, *columns = zip(*tables, strict=True)
            named = zip(("loss", *names), columns, strict=True)
            rows.append({**row, "loss": 0.0, "grad_norm": own[0], "skipped": int(own[1] > 0),
                         **{name: combine(name, parts, step.count) for name, parts in named}})  # fmt: skip
        self.trackers.log_steps(rows)

    @staticmethod
    def _numbers(step: StepResult, names: list[str], zero: Tensor) -> Tensor:
        parts = [step.grad_norm, step.skipped, step.loss, *(step.metrics.get(name, zero) for name in names)]
        return torch.stack([part.to(zero.dtype) for part in parts])


class Recorder:
    """Records a run's metrics in trackers and progress bar."""

    def __init__(
        self, trackers: Trackers, progress: ProgressBar, step_log: StepLog, throughput: Throughput, source: BatchSource,
        ranks: Ranks, device: torch.device, validation_metrics: Callable[[float], Row], scores: Callable[[], Row],
        sample: Callable[[int], str] | None, best: str = "lowest val_loss",
    ) -> None:  # fmt: skip
        """The caller supplies the validation loss with metrics derived from it, task scores, and a sampled text; and
        which metric makes the best checkpoint."""
        self.trackers, self.progress, self.step_log, self.throughput = trackers, progress, step_log, throughput
        self.source, self.ranks, self.device = source, ranks, device
        self.validation_metrics, self.scores, self.sample = validation_metrics, scores, sample
        self.best = best.split()[1]

    def update_progress(self, position: Position, meter: Meter, batches: int, seconds: float) -> None:
        """Shows the macro-batch so far; not after every step, since reading the loss waits for the device."""
        self.progress.update(
            batches,
            {
                # Only of this process's rows, as an estimate.
                "train_loss": mean(meter.loss.item() * self.ranks.world_size, meter.count.item()),
                "lr": meter.lr,
                "visited_share": self.source.metrics().get("visited_share"),
                **self.throughput.metrics(meter.samples, seconds),
            },
        )

    def record(self, position: Position, meter: Meter, val_loss: float, recovery: Row, skipped_steps: int) -> Row:
        """Records and returns the metrics of the macro-batch just finished."""
        row = {**self._row(position, meter, val_loss), "skipped_steps": skipped_steps, **recovery}
        self.trackers.record(row)
        self.progress.record(row)
        return row

    def ranked(self, row: Row, save: Callable[[], None]) -> float:
        """The metric that makes the best checkpoint.

        Raises:
            UserError: there is no such metric; the run is saved before, so that it can go on by another.
        """
        if (value := row.get(self.best)) is None:
            save()
            raise UserError(
                f"saving.best names {self.best!r}, which is not a metric of this run{nearest(self.best, row)}; the run "
                "is saved: name another with cleangpt resume RUN --saving.best"
            )
        return value

    def record_sample(self, macro_batch: int) -> None:
        """Records a text sampled from the model, if configured."""
        sample = self.sample
        if sample is not None and (text := self._try(lambda: sample(macro_batch))) is not None:
            self.trackers.sample(macro_batch, text)

    def _try(self, generate: Callable[[], T]) -> T | None:
        """What the model generates; None, with a line, if its logits are not finite: its losses will end the run."""
        try:
            return generate()
        except UserError as error:
            self.progress.log(f"nothing is generated: {error}")
            return None

    def _row(self, position: Position, meter: Meter, val_loss: float) -> dict[str, float | int | None]:
        waited, peaks = zip(*self.ranks.all_gather((meter.waited, peak_memory(self.device))), strict=True)
        return {
            "macro_batch": position.macro_batch,
            "step": position.step,
            "samples": position.samples,
            "tokens": position.samples * self.throughput.seq_len,
            "train_loss": meter.mean_loss(),
            **{f"train_{name}": value for name, value in meter.mean_metrics().items()},
            **self.validation_metrics(val_loss),
            **(self._try(self.scores) or {}),
            "lr": meter.lr,
            "weight_decay": meter.weight_decay,
            "training_batch_size": meter.samples / meter.steps,
            "grad_norm": meter.mean_grad_norm(),
            **self.source.metrics(),
            **self.throughput.metrics(meter.samples, meter.seconds),
            "step_time": meter.seconds / meter.steps,
            "data_wait_share": max(waited) / meter.seconds,
            "time_trained": position.time_trained,
            "peak_memory": None if None in peaks else max(peaks),
        }
