"""The trainer: a whole run on one screen (`Trainer.train`), and an optimizer step on another (`Trainer.step`)."""

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cleangpt.checkpoints.checkpoint import Checkpoints
from cleangpt.checkpoints.run_folder import write_status
from cleangpt.data.batch import Batch
from cleangpt.data.source import BatchSource
from cleangpt.distributed.layout import Layout
from cleangpt.distributed.parallelize import gradient_sync
from cleangpt.distributed.processes import Ranks
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Objective
from cleangpt.objectives.step_means import with_step_means
from cleangpt.training.balancing import ExpertLoadBalancer
from cleangpt.training.meter import LossSums, Meter, StepResult
from cleangpt.training.metrics import Recorder
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.recovery import Recovery, SpikeDetector
from cleangpt.training.saving import Saver
from cleangpt.training.schedules import StepPlan
from cleangpt.training.state import Length, Position
from cleangpt.training.stopping import Stopping
from cleangpt.training.validator import Validator

GLANCE = 0.25
"""Seconds between two updates of the progress bar."""


@dataclass(kw_only=True)
class Trainer:
    """Trains a run from its current position; `build.py` constructs it."""

    run: Path
    model: LanguageModel
    forward_model: LanguageModel
    """The module to call in training: the model, compiled, and wrapped in DDP if it is used."""
    objective: Objective
    source: BatchSource
    optimizer: Optimizer
    balancer: ExpertLoadBalancer
    validator: Validator | None
    """None: no validation, and no best checkpoints."""
    plan: Callable[[int], StepPlan]
    """The plan of the step that starts after a number of samples."""
    length: Length
    micro_batch_size: int
    snapshot_every: int
    device: torch.device
    autocast: AbstractContextManager[Any]
    layout: Layout
    ranks: Ranks
    position: Position
    meter: Meter
    spikes: SpikeDetector
    recovery: Recovery
    saver: Saver
    checkpoints: Checkpoints
    recorder: Recorder
    stopping: Stopping

    def train(self) -> str:
        """Runs macro-batches until the last, early stopping or a signal; returns which of these ended the run."""
        status = "failed"
        with self.stopping.signals:
            self._start()
            try:
                while not (ended := self.stopping.status(self.position)):
                    self.train_macro_batch()
                    if self.recovery.roll_back():
                        continue
                    val_loss = self.validate()
                    if self.stopping.requested:
                        continue
                    self.position.macro_batch += 1
                    ranked = self.record(val_loss)
                    self.keep_checkpoint(ranked)
                    self.stopping.early.update(ranked)
                    if self.position.macro_batch % self.snapshot_every == 0:
                        self.save_snapshot()
                self.saver.save_last(self.recovery.check_weights)
                status = ended
            finally:
                self._end(status)
        return status

    def train_macro_batch(self) -> None:
        """Takes steps to the end of the macro-batch, or until the run is asked to stop."""
        self.model.train()
        end = (self.position.macro_batch + 1) * self.length.samples_per_macro_batch
        started, waited, shown = time.perf_counter(), self.source.wait_time, time.perf_counter()
        self.recorder.step_log.restart_clock()
        while self.position.samples < end and not self._must_stop() and self.spikes.found is None:
            self.step()
            if time.perf_counter() - shown > GLANCE:
                shown = time.perf_counter()
                self._update_progress(self.meter.seconds + shown - started)
        self.meter.loss.item()  # waits for the device, so that the time is that of finished work
        self.meter.seconds += time.perf_counter() - started
        self.meter.waited += self.source.wait_time - waited
        self.recorder.step_log.flush()
        self.recovery.check_skipped()

    def step(self) -> None:
        """One optimizer update: the gradient of the mean loss per counted thing over the whole step (design rule 3)."""
        self.ranks.heartbeat(self.position.step)
        plan = self.plan(self.position.samples)
        batches = [self.source.next() for _ in range(plan.accumulation)]
        (count,) = self.ranks.sum(sum(map(self.objective.count, batches)) / self.layout.tensor)
        batches = self._with_step_means(batches, count)
        sums = LossSums(self.device, copies=self.layout.tensor)
        for number, batch in enumerate(batches, start=1):
            self._backward(batch, count, sums, last=number == len(batches))
        grad_norm = self.optimizer.step(plan.lr, plan.weight_decay)
        self.balancer.step()
        result = StepResult(
            sums.total, sums.metrics, count, grad_norm, self.optimizer.skipped[1],
            plan.accumulation * self.length.batch_size, plan.lr, plan.weight_decay,
        )  # fmt: skip
        self.position.samples += result.samples
        self.position.step += 1
        self.meter.add(result)
        self.spikes.observe(self.position.samples, result)
        self.recorder.step_log.add(self.position, result)

    def _with_step_means(self, batches: list[Batch], count: float) -> list[Batch]:
        """The batches with means over the whole step, which the objective reads."""
        parts = (part.to(self.device) for batch in batches for part in batch.split(self.micro_batch_size))
        with self.autocast:
            return with_step_means(
                self.objective, self.forward_model, batches, parts, count,
                lambda total: self.ranks.sum(total)[0] / self.layout.tensor,
            )  # fmt: skip

    def _backward(self, batch: Batch, count: float, sums: LossSums, last: bool = True) -> None:
        """Accumulates the gradient of a batch, one micro-batch at a time; the `last` one all-reduces it.

        The all-reduce takes the mean over data-parallel ranks, where the sum is needed, hence the factor `parts`.
        """
        micro_batches = list(batch.to(self.device).split(self.micro_batch_size))
        for number, micro_batch in enumerate(micro_batches, start=1):
            with gradient_sync(self.forward_model, last and number == len(micro_batches)):
                with self.autocast:
                    loss = self.objective(self.forward_model, micro_batch)
                self.optimizer.backward(loss.total * (self.layout.dp_size / max(count, 1)))
            sums.add(loss)

    def validate(self) -> float:
        """The validation loss; NaN if a signal interrupted it, or if there is no validator."""
        if self.validator is None:
            return math.nan
        val_loss = self.validator.validate(self._must_stop)
        if not math.isfinite(val_loss) and not self.stopping.requested:
            self.recovery.check_weights()
            if self.position.macro_batch + 1 == self.length.macro_batches:
                self.recovery.check_last_steps()
        return val_loss

    def record(self, val_loss: float) -> float:
        """Records the metrics of the macro-batch just finished, and starts the next; returns that of `saving.best`."""
        self.position.read_clock()
        skipped = int(self.optimizer.skipped[0].item())
        row = self.recorder.record(self.position, self.meter, val_loss, self.recovery.metrics(), skipped)
        self.meter.reset()
        self.stopping.deadline.begin_macro_batch()
        return self.recorder.ranked(row, self.save_snapshot)

    def keep_checkpoint(self, ranked: float) -> None:
        """Saves a checkpoint, and records a text sampled from the model, if it is among the best."""
        if self.checkpoints.offer(self.position.macro_batch, ranked, self.model):
            self.recorder.record_sample(self.position.macro_batch)

    def save_snapshot(self) -> None:
        """Saves everything that a resumed run needs, while training continues."""
        self.recorder.step_log.flush()
        self.saver.save(self.recovery.check_weights)

    def _must_stop(self) -> bool:
        """Whether the run stops here, the same on all processes; saves or fails if any of them must."""
        stop = self.stopping.poll(self.saver.snapshots.longest_save)
        if self.stopping.failing:
            self.recovery.check_skipped()
        if self.stopping.save_requested and self.spikes.detect() is None:
            self.stopping.saved()
            self.save_snapshot()
            self.recorder.progress.log(f"saving {self.saver.snapshots.folder / self.saver.saved}")
        return stop

    def _update_progress(self, seconds: float) -> None:
        self.stopping.must_fail = self.recovery.health.skipped_too_many()
        batches = self.position.samples // self.length.batch_size
        self.recorder.update_progress(self.position, self.meter, batches, seconds)

    def _start(self) -> None:
        done = self.position.samples // self.length.batch_size
        self.recorder.progress.start(self.length.macro_batches, self.length.batches_per_macro_batch, done)
        self.position.start_clock()
        self._write_status(None)
        if self.spikes.enabled and not self.saver.saved:
            self.save_snapshot()  # so that there is always one to return to

    def _end(self, status: str) -> None:
        self.saver.snapshots.close()
        self.recorder.progress.close()
        self._write_status(status)
        self.recorder.trackers.close(status)
        self.source.close()

    def _write_status(self, status: str | None) -> None:
        """Writes how the run has ended to status.json, unless the disk is full."""
        if self.ranks.is_main:
            with contextlib.suppress(OSError):
                write_status(self.run, status, self.stopping.reason)
