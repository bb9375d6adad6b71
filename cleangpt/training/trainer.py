"""The life of a run, on one screen: `Trainer.train`."""

import time
from pathlib import Path
from typing import Any

import torch

from cleangpt.config import Experiment, samples_per_macro_batch
from cleangpt.data.batches import Batch, BatchLoader, Samples, validation_batches
from cleangpt.data.order import Order
from cleangpt.data.store import TokenStore
from cleangpt.errors import RunFailedError
from cleangpt.evaluation import SCORES
from cleangpt.evaluation.validate import loss_figures, mean_loss
from cleangpt.inference.text import sample_text
from cleangpt.models import build_model, flops_per_token
from cleangpt.objectives import OBJECTIVES
from cleangpt.tracking import Silence, open_trackers
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training import schedules
from cleangpt.training.checkpoints import Checkpoints, fill, load_checkpoint
from cleangpt.training.device import (
    RandomState,
    autocast,
    choose_device,
    peak_flops,
    peak_memory,
    seed_everything,
)
from cleangpt.training.early_stopping import EarlyStopping
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.parallel import load_weights, parallelize, recompute, whole, without_sync
from cleangpt.training.position import Meter, Position
from cleangpt.training.ranks import Ranks
from cleangpt.training.run import experiment_json, find_checkpoint
from cleangpt.training.signals import StopRequest
from cleangpt.training.snapshots import clean, load_snapshot, newest_snapshot, save_snapshot, snapshot_name


class Trainer:
    """Trains the experiment of a run, from its newest snapshot where there is one."""

    def __init__(
        self, experiment: Experiment, run: Path, store: TokenStore, progress: ProgressBar, ranks: Ranks | None = None
    ) -> None:
        self.experiment, self.run, self.store, self.progress = experiment, run, store, progress
        self.ranks = ranks or Ranks()
        training, data = experiment.training, experiment.data
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        self.device = choose_device(training.device, self.ranks.local_rank)
        seed_everything(training.seed)
        self.model = build_model(experiment.model).to(self.device)
        recompute(self.model, training.recompute_every)
        self.forward_model = parallelize(self.model, experiment.parallel, self.ranks, self.device, training.compile)
        if self.ranks.world_size > 1:
            seed_everything(training.seed + self.ranks.rank)  # every process drops out activations of its own
        self.objective = OBJECTIVES[experiment.objective]
        self.context = autocast(self.device, training.precision)
        self.micro_batch_size = training.micro_batch_size or data.batch_size // self.ranks.world_size
        self.samples = Samples(store.splits["train"], data.seq_len, "train")
        self.val_samples = Samples(store.splits["val"], data.seq_len, "val")
        self.stop, self.stopping = StopRequest(), False
        self.position, self.meter = Position(), Meter(self.device)
        self.optimizer = Optimizer(self.model, experiment.optimizer, scale_loss=training.precision == "fp16")
        self.early_stopping = EarlyStopping(experiment.early_stopping)
        self.checkpoints = Checkpoints(run / "checkpoints", experiment.saving, self.ranks.is_main)
        self.saved = ""
        snapshot = self._restore()
        told_until = self.position.macro_batch if snapshot else None
        self.trackers = Silence(run) if not self.ranks.is_main else open_trackers(
            experiment, experiment_json(experiment), run, snapshot.get("trackers"), told_until, progress.say
        )  # fmt: skip
        self.loader = BatchLoader(
            self.samples,
            Order(self.samples.num_training, training.seed),
            data.batch_size,
            self.position.samples,
            prefetch=data.prefetch,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    # The run ------------------------------------------------------------------------------------------------------

    def train(self) -> str:
        """Runs macro-batches until the last, until early stopping or until a signal; returns which of these."""
        status = "failed"
        self._start()
        try:
            with self.stop:
                while not (ended := self._ended()):
                    self.train_macro_batch()
                    val_loss = self.validate()
                    if self.stopping:
                        continue
                    self.position.macro_batch += 1
                    self.record(val_loss)
                    self.keep_checkpoint(val_loss)
                    self.early_stopping.update(val_loss)
                    if self.position.macro_batch % self.experiment.saving.snapshot_every == 0:
                        self.save_snapshot()
                self.save_snapshot()
            status = ended
        finally:
            self._end(status)
        return status

    def train_macro_batch(self) -> None:
        """Makes steps to the end of the macro-batch, or until a signal asks to stop."""
        self.model.train()
        size = samples_per_macro_batch(self.experiment)
        end = (self.position.macro_batch + 1) * size
        started, waited, told = time.perf_counter(), self.loader.wait_time, time.perf_counter()
        while self.position.samples < end and not self._agree_to_stop():
            self.step()
            if time.perf_counter() - told > 0.25:
                told = time.perf_counter()
                self._tell(self.meter.seconds + told - started)
        self.meter.sums.sum().item()  # waits for the device, so that the time is that of the work
        self.meter.seconds += time.perf_counter() - started
        self.meter.waited += self.loader.wait_time - waited
        self._check_skipped()

    def step(self) -> None:
        """One update: the gradient of the mean loss per target over all batches of the step (design rule 3)."""
        count = schedules.accumulation(self.experiment, self.position.samples)
        lr = schedules.learning_rate(self.experiment, self.position.samples, count)
        weight_decay = schedules.weight_decay(self.experiment, self.position.samples, count)
        batches = [self.loader.next() for _ in range(count)]
        (targets,) = self.ranks.sum(sum(batch.num_targets for batch in batches))
        for number, batch in enumerate(batches, start=1):
            self._backward(batch, targets, last=number == count)
        self.meter.sums[1] += self.optimizer.step(lr, weight_decay)
        self.meter.lr, self.meter.weight_decay = lr, weight_decay
        self.meter.targets += targets
        self.meter.steps += 1
        self.meter.samples += count * self.experiment.data.batch_size
        self.position.samples += count * self.experiment.data.batch_size
        self.position.step += 1

    def _backward(self, batch: Batch, targets: float, last: bool = True) -> None:
        """Adds a batch's share to the gradient, a micro-batch at a time; the `last` one exchanges it with the others.

        The exchange takes the mean over the devices of sums that each is a part, hence the factor `world_size`.
        """
        inputs = batch.inputs.to(self.device, non_blocking=True)
        expected = batch.targets.to(self.device, non_blocking=True)
        for start in range(0, len(inputs), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            with without_sync(self.forward_model, last and part.stop >= len(inputs)):
                with self.context:
                    loss = self.objective(self.forward_model, inputs[part], expected[part])
                self.optimizer.backward(loss * (self.ranks.world_size / max(targets, 1)))
            # A loss that is not finite skips the step; kept out of the mean, it does not hide the other steps'.
            self.meter.sums[0] += loss.detach().nan_to_num(0.0, 0.0, 0.0)

    def validate(self) -> float:
        """The loss per target on the validation split, in nats; NaN when a signal cut it short."""
        batches = validation_batches(
            self.val_samples, self.micro_batch_size, self.experiment.data.val_samples,
            rank=self.ranks.rank, world_size=self.ranks.world_size,
        )  # fmt: skip
        return mean_loss(
            self.forward_model, self.objective, batches, self.device, self.context,
            self._agree_to_stop, self.ranks.sum_tensor,
        )  # fmt: skip

    # What it leaves behind ----------------------------------------------------------------------------------------

    def record(self, val_loss: float) -> None:
        """Tells the trackers the figures of the macro-batch just finished, and begins to sum the next."""
        self._read_clock()
        figures = self._figures(val_loss)
        self.trackers.record(figures)
        self.progress.record(figures)
        self.meter = Meter(self.device)

    def keep_checkpoint(self, val_loss: float) -> None:
        """Saves a checkpoint, and a sample of what the model writes, if the loss is among the best."""
        macro_batch, tracking = self.position.macro_batch, self.experiment.tracking
        if not self.checkpoints.wanted(macro_batch, val_loss):
            return
        weights = whole(self.model.state_dict())
        self.checkpoints.save(macro_batch, val_loss, weights, self.experiment.model, self.store.tokenizer)
        if tracking.sample_tokens:
            text = sample_text(
                self.model, self.store, tracking.sample_prompt, tracking.sample_tokens, self.device, seed=macro_batch
            )
            self.trackers.sample(macro_batch, text)

    def save_snapshot(self) -> None:
        """Saves everything that a resumed run needs; this is the one list of it (design rule 5)."""
        self._read_clock()
        size = samples_per_macro_batch(self.experiment)
        batches = (self.position.samples - self.position.macro_batch * size) // self.experiment.data.batch_size
        name = snapshot_name(self.position.macro_batch, batches)
        if name == self.saved:
            return
        state = {
            "position": self.position.state_dict(),
            "meter": self.meter.state_dict(self.ranks),
            "model": whole(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "checkpoints": self.checkpoints.state_dict(),
            "trackers": self.trackers.state_dict(),
            "random": self.ranks.gather(RandomState(self.device).state_dict()),
        }
        if self.ranks.is_main:
            save_snapshot(self.run / "snapshots", name, state, self.experiment.saving.keep_snapshots)
        self.saved = name

    def _restore(self) -> dict[str, Any]:
        """Puts every part where the newest good snapshot left it; without one, loads `init_from`."""
        path = self.ranks.from_main(self._newest_snapshot() if self.ranks.is_main else None)
        if path is None:
            self._initialise()
            return {}
        state = load_snapshot(path)
        self.position.load_state_dict(state["position"])
        self.meter.load_state_dict(state["meter"], self.ranks)
        load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.checkpoints.load_state_dict(state["checkpoints"])
        if self.ranks.rank < len(state["random"]):
            RandomState(self.device).load_state_dict(state["random"][self.ranks.rank])
        self.saved = path.name
        self.progress.say(f"going on from {path}, step {self.position.step:,}")
        return state

    def _newest_snapshot(self) -> Path | None:
        """The newest good snapshot; removes what an interrupted one left, and complains of a damaged one."""
        clean(self.run / "snapshots")
        path, complaints = newest_snapshot(self.run / "snapshots")
        for line in complaints:
            self.progress.say(line)
        return path

    def _initialise(self) -> None:
        """Fine-tuning: takes the weights of `init_from` that fit, and says which do not."""
        if self.experiment.init_from is None:
            return
        checkpoint = load_checkpoint(find_checkpoint(self.experiment.init_from))
        differing = fill(self.model, checkpoint.weights)
        if checkpoint.tokenizer.to_json() != self.store.tokenizer.to_json():
            differing.append("its tokenizer is not the corpus's, so token ids may mean other texts")
        self.progress.say(f"starting from the weights of {checkpoint.folder}")
        for line in differing:
            self.progress.say(f"  {line}")

    # Figures ------------------------------------------------------------------------------------------------------

    def _figures(self, val_loss: float) -> dict[str, float | int | None]:
        experiment, meter, position = self.experiment, self.meter, self.position
        (train_loss,) = self.ranks.sum(meter.sums[0].item() / max(meter.targets, 1))
        return {
            "macro_batch": position.macro_batch,
            "step": position.step,
            "samples": position.samples,
            "tokens": position.samples * experiment.data.seq_len,
            "train_loss": train_loss,
            "val_loss": val_loss,
            **loss_figures(val_loss, self.store.splits["val"]),
            **self._score(),
            "lr": meter.lr,
            "weight_decay": meter.weight_decay,
            "training_batch_size": meter.samples / meter.steps,
            "grad_norm": meter.sums[1].item() / meter.steps,
            "visited_share": min(1.0, position.samples / self.samples.num_training),
            "times_visited": position.samples / self.samples.num_training,
            **self._throughput(meter.seconds),
            "step_time": meter.seconds / meter.steps,
            "data_wait_share": meter.waited / meter.seconds,
            "time_trained": position.time_trained,
            "peak_memory": peak_memory(self.device),
            "skipped_steps": int(self.optimizer.skipped[0].item()),
        }

    def _score(self) -> dict[str, float]:
        """The corpus's task score, on the same few validation samples every time."""
        task, count = self.experiment.corpus.task, self.experiment.tracking.score_samples
        if not task or not count:
            return {}
        self.model.eval()
        return {task: SCORES[task](self.model, self.store.splits["val"], count, self.device)}

    def _tell(self, seconds: float) -> None:
        """Shows the macro-batch so far; reading the loss waits for the device, so this is done a few times a second."""
        self._check_skipped()
        batches = self.position.samples // self.experiment.data.batch_size
        self.progress.update(
            batches,
            {
                # Of this process's part of the targets, which stands for all.
                "train_loss": self.meter.sums[0].item() * self.ranks.world_size / max(self.meter.targets, 1),
                "lr": self.meter.lr,
                "visited_share": min(1.0, self.position.samples / self.samples.num_training),
                **self._throughput(seconds),
            },
        )

    def _throughput(self, seconds: float) -> dict[str, float | None]:
        """Tokens per second of the macro-batch so far, and their share of the device's peak where that is known."""
        seq_len, peak = self.experiment.data.seq_len, peak_flops(self.device)
        rate = self.meter.samples * seq_len / seconds
        return {"tokens_per_second": rate, "mfu": rate * flops_per_token(self.model, seq_len) / peak if peak else None}

    def _check_skipped(self) -> None:
        """Ends the run when too many steps in a row had a loss or gradient that was not finite."""
        limit = self.experiment.training.max_skipped_steps
        if int(self.optimizer.skipped[2].item()) < limit:
            return
        path, _ = newest_snapshot(self.run / "snapshots")
        where = f"the last good snapshot is {path}" if path else "there is no snapshot yet"
        raise RunFailedError(
            f"{limit} steps in a row up to step {self.position.step:,} had a loss or gradient that is not finite; "
            f"{where}; a lower optimizer.lr or longer schedule.lr.warmup may help"
        )

    # Start and end ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        training = self.experiment.training
        done = self.position.samples // self.experiment.data.batch_size
        self.progress.start(training.macro_batches, training.batches_per_macro_batch, done)
        self._clock = time.perf_counter()

    def _ended(self) -> str:
        """Why the run is over; empty while it is not."""
        if self.stopping:
            return "interrupted"
        if self.position.macro_batch >= self.experiment.training.macro_batches:
            return "finished"
        return "stopped early" if self.early_stopping.should_stop else ""

    def _agree_to_stop(self) -> bool:
        """Whether any process has been asked to stop; all get the same answer."""
        (asked,) = self.ranks.sum(self.stop.requested is not None)
        self.stopping = asked > 0
        return self.stopping

    def _end(self, status: str) -> None:
        self.progress.close()
        self.trackers.close(status)
        self.loader.close()

    def _read_clock(self) -> None:
        now = time.perf_counter()
        self.position.time_trained += now - self._clock
        self._clock = now
