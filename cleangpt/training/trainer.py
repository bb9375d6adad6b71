"""The life of a run, on one screen: `Trainer.train`."""

import contextlib
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from cleangpt.checkpoints.checkpoint import Checkpoints, config_mismatches, load_matching_weights
from cleangpt.checkpoints.run_folder import experiment_json, find_moments, write_status
from cleangpt.checkpoints.snapshots import (
    Snapshots,
    list_snapshots,
    load_snapshot,
    newest_snapshot,
    set_aside,
    snapshot_name,
)
from cleangpt.corpora.mixture import tasks
from cleangpt.data.batch import Batch
from cleangpt.data.loader import BatchLoader, StreamWithout, add_range, validation_batches
from cleangpt.data.mixing import Store, mean_shares, split_samples, stores
from cleangpt.data.tokenizers import same_tokens
from cleangpt.distributed.device import (
    RandomState,
    autocast,
    can_compile,
    choose_device,
    choose_precision,
    compile_blocks,
    compute_dtype,
    keep_freed_memory,
    peak_flops,
    peak_memory,
    seed_everything,
    set_fp32_precision,
    uncompiled,
    use_fp8,
)
from cleangpt.distributed.layout import choose_layout, state_bytes
from cleangpt.distributed.parallelize import apply_activation_checkpointing, gradient_sync, parallelize, wrap_ddp
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.signals import StopRequest
from cleangpt.distributed.tensors import gather_to_host
from cleangpt.errors import DivergedError, RunFailedError, UserError, parsing
from cleangpt.evaluation.tasks import SCORES
from cleangpt.evaluation.validate import loss_figures, mean_loss, source_figures
from cleangpt.experiment import Experiment, samples_per_macro_batch
from cleangpt.files import find_corruption, recover_folder
from cleangpt.inference.text import sample_text
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel, flops_per_token
from cleangpt.tracking import NullTracker, open_trackers
from cleangpt.tracking.metrics import of_source
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training import schedules
from cleangpt.training.balancing import ExpertLoadBalancer
from cleangpt.training.deadline import WRITE_RATE, Deadline
from cleangpt.training.early_stopping import EarlyStopping
from cleangpt.training.finetuning import freeze_and_add_lora, frozen_names, load_moments, lr_factors
from cleangpt.training.mup import mup_scales, scale_init
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.recovery import Spikes, first_not_finite
from cleangpt.training.resolve import open_stream
from cleangpt.training.state import Meter, Position

PAUSE = 10
"""Seconds between two tries to save the last snapshot of a run."""


class Trainer:
    """Trains the experiment of a run, from its newest snapshot where there is one."""

    def __init__(
        self, experiment: Experiment, run: Path, store: Store, progress: ProgressBar, ranks: Ranks | None = None,
        end: float | None = None,
    ) -> None:  # fmt: skip
        """`end` is when the run must have saved and ended, in seconds since 1970; None: when it is done."""
        self.experiment, self.run, self.store, self.progress = experiment, run, store, progress
        self.ranks = ranks or Ranks()
        training, data = experiment.training, experiment.data
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        self.device = choose_device(training.device, self.ranks.local_rank)
        keep_freed_memory(self.device)
        seed_everything(training.seed)
        tuning = experiment.fine_tuning
        self.layout = choose_layout(
            experiment.parallel, experiment.model, self.ranks, self.device, partial(freeze_and_add_lora, config=tuning)
        )
        widths = mup_scales(experiment.model, experiment.optimizer)
        self.objective = experiment.objective
        self._build_model()
        scale_init(self.model, widths)
        if self.ranks.world_size > 1:
            seed_everything(training.seed + self.ranks.rank)  # every process drops out activations of its own
        self.model.loss_chunk = training.loss_chunk
        self.micro_batch_size = training.micro_batch_size or data.batch_size // self.layout.parts
        self.stream = StreamWithout(open_stream(experiment, store), [])
        self.val_samples, self.val_losses = split_samples(store, "val", data.seq_len), dict[str, float]()
        self.stop, self.stopping, self.failing = StopRequest(), False, False
        self.reason: str | None = None
        """Why it stops before its end."""
        self.deadline = Deadline(end, state_bytes(self.model) / WRITE_RATE)
        self.position, self.meter = Position(), Meter(self.device)
        self.optimizer = Optimizer(
            self.model, experiment.optimizer, scale_loss=training.precision == "fp16",
            factors=lr_factors(self.model, experiment.optimizer, tuning.layer_decay),
            mup_scales={name: factor.lr for name, factor in widths.items()},
        )  # fmt: skip
        self.balancing = ExpertLoadBalancer(self.model, self.ranks.sum_tensor, frozen_names(self.model, tuning))
        self.early_stopping, self.spikes = EarlyStopping(experiment.early_stopping), Spikes(training)
        self.checkpoints = Checkpoints(run / "checkpoints", experiment.saving, self.ranks)
        self.snapshots = Snapshots(
            run / "snapshots", experiment.saving, self.ranks, experiment.parallel.timeout, progress.log
        )
        self.saved = ""
        snapshot = self._restore()
        last_logged = self.position.macro_batch if snapshot else None
        self.trackers = NullTracker(run) if not self.ranks.is_main else open_trackers(
            experiment, experiment_json(experiment), run, snapshot.get("trackers"), last_logged, progress.log
        )  # fmt: skip
        self.loader = self._open_loader()

    def _open_loader(self) -> BatchLoader:
        data = self.experiment.data
        self.stream.skipped_ranges = self.position.skipped_ranges
        return BatchLoader(
            self.stream,
            data.batch_size,
            self.position.samples,
            prefetch=data.prefetch,
            pin_memory=self.device.type == "cuda",
            rank=self.layout.part(self.ranks.rank),
            world_size=self.layout.parts,
        )

    def _build_model(self) -> None:
        """The model spread over the devices, and the way to call it: compiled, and in the precision asked for."""
        training, parallel = self.experiment.training, self.experiment.parallel
        compiled = training.compile if can_compile(self.device) else "off"
        if compiled != training.compile:
            self.progress.log(f"training.compile is {training.compile}, but no compiler was found; going on without")

        def prepare(model: LanguageModel) -> None:
            if training.precision == "fp8":
                use_fp8(model)
            freeze_and_add_lora(model, self.experiment.fine_tuning)
            apply_activation_checkpointing(model, training.recompute_every)
            if compiled == "blocks":
                compile_blocks(model)

        set_fp32_precision(choose_precision(self.device, training.precision))
        dtype = compute_dtype(self.device, training.precision)
        gathered = self.layout.shards > 1 and dtype == torch.bfloat16
        self.model = parallelize(
            lambda: build_model(self.experiment.model, self.objective.heads), self.layout, self.device, prepare,
            gather_dtype=dtype if gathered else None, reshard_after_forward=parallel.reshard_after_forward,
            timeout=self.ranks.timeout,
        )  # fmt: skip
        self.context = autocast(self.device, torch.float32 if gathered else dtype)
        called = cast(LanguageModel, torch.compile(self.model)) if compiled == "model" else self.model
        self.forward_model = wrap_ddp(called, self.layout, self.device)

    # The run ------------------------------------------------------------------------------------------------------

    def train(self) -> str:
        """Runs macro-batches until the last, until early stopping or until a signal; returns which of these."""
        status = "failed"
        with self.stop:
            self._start()
            try:
                while not (ended := self._ended()):
                    self.train_macro_batch()
                    if self.roll_back_at_spike():
                        continue
                    val_loss = self.validate()
                    if self.stopping:
                        continue
                    self.position.macro_batch += 1
                    self.record(val_loss)
                    self.keep_checkpoint(val_loss)
                    self.early_stopping.update(val_loss)
                    if self.position.macro_batch % self.experiment.saving.snapshot_every == 0:
                        self.save_snapshot()
                self.save_last_snapshot()
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
        while self.position.samples < end and not self._agree_to_stop() and self.spikes.found is None:
            self.step()
            if time.perf_counter() - told > 0.25:
                told = time.perf_counter()
                self._update_progress(self.meter.seconds + told - started)
        self.meter.sums.sum().item()  # waits for the device, so that the time is that of the work
        self.meter.seconds += time.perf_counter() - started
        self.meter.waited += self.loader.wait_time - waited
        self._check_skipped()

    def step(self) -> None:
        """One update: the gradient of the mean loss per target over all batches of the step (design rule 3)."""
        self.ranks.heartbeat(self.position.step)
        count = schedules.accumulation(self.experiment, self.position.samples)
        lr = schedules.learning_rate(self.experiment, self.position.samples, count)
        weight_decay = schedules.weight_decay(self.experiment, self.position.samples, count)
        batches = [self.loader.next() for _ in range(count)]
        before = self.meter.sums[0].clone() if self.spikes.enabled else None
        (targets,) = self.ranks.sum(sum(map(self.objective.count, batches)) / self.layout.tensor)
        for number, batch in enumerate(batches, start=1):
            self._backward(batch, targets, last=number == count)
        self.meter.sums[1] += self.optimizer.step(lr, weight_decay)
        self.balancing.step()
        self.meter.lr, self.meter.weight_decay = lr, weight_decay
        self.meter.targets += targets
        self.meter.steps += 1
        self.meter.samples += count * self.experiment.data.batch_size
        self.position.samples += count * self.experiment.data.batch_size
        self.position.step += 1
        if before is not None:
            loss = (self.meter.sums[0] - before) / max(targets, 1)
            self.spikes.note(self.position.samples, loss, self.optimizer.skipped[1])

    def _backward(self, batch: Batch, targets: float, last: bool = True) -> None:
        """Adds a batch's share to the gradient, a micro-batch at a time; the `last` one exchanges it with the others.

        The exchange takes the mean over the parts of the batch, of which the sum is wanted, hence the factor `parts`.
        """
        parts = list(batch.to(self.device).split(self.micro_batch_size))
        for number, part in enumerate(parts, start=1):
            with gradient_sync(self.forward_model, last and number == len(parts)):
                with self.context:
                    loss = self.objective(self.forward_model, part).total
                self.optimizer.backward(loss * (self.layout.parts / max(targets, 1)))
            # A loss that is not finite skips the step; kept out of the mean, it does not hide the other steps'.
            self.meter.sums[0] += loss.detach().nan_to_num(0.0, 0.0, 0.0) / self.layout.tensor

    def validate(self) -> float:
        """The loss per target on the validation split, in nats; NaN when a signal cut it short.

        Of a mixture: the mean of the sources' losses, by their shares of the run.
        """
        data = self.experiment.data
        for name, samples in self.val_samples.items():
            batches = validation_batches(
                samples, data.val_batch_size or self.micro_batch_size, data.val_samples,
                rank=self.layout.part(self.ranks.rank), world_size=self.layout.parts,
            )  # fmt: skip
            self.val_losses[name] = mean_loss(
                self.forward_model, self.objective, batches, self.device, self.context,
                self._agree_to_stop, self.ranks.sum_tensor,
            )  # fmt: skip
        val_loss = sum(share * self.val_losses[name] for name, share in mean_shares(self.store).items())
        if not math.isfinite(val_loss) and not self.stopping:
            self._check_weights()
        return val_loss

    # What it leaves behind ----------------------------------------------------------------------------------------

    def record(self, val_loss: float) -> None:
        """Tells the trackers the figures of the macro-batch just finished, and begins to sum the next."""
        self._read_clock()
        figures = self._figures(val_loss)
        self.trackers.record(figures)
        self.progress.record(figures)
        self.meter = Meter(self.device)
        self.deadline.begin_macro_batch()

    def keep_checkpoint(self, val_loss: float) -> None:
        """Saves a checkpoint, and a sample of what the model writes, if the loss is among the best."""
        macro_batch, tracking = self.position.macro_batch, self.experiment.tracking
        if not self.checkpoints.wanted(macro_batch, val_loss):
            return
        weights = gather_to_host(self.model.state_dict(), keep=self.ranks.is_main)
        experiment, store = self.experiment, self.store
        reason = self.checkpoints.save(
            macro_batch, val_loss, weights, experiment.model, store.tokenizer,
            experiment.fine_tuning.lora, store.chat_template,
        )  # fmt: skip
        if reason:
            self.progress.log(f"the checkpoint of macro-batch {macro_batch} could not be saved: {reason}")
        if tracking.sample_tokens:
            first, *_ = stores(self.store).values()
            with uncompiled():
                text = sample_text(
                    self.model, first, tracking.sample_prompt, tracking.sample_tokens, self.device, macro_batch
                )
            self.trackers.sample(macro_batch, text)

    def save_snapshot(self) -> None:
        """Saves everything that a resumed run needs; this is the one list of it (design rule 5).

        It is written while training goes on. One that could not be written is made up for by the next.
        """
        self._read_clock()
        if self.snapshots.wait():
            self.saved = ""
        size = samples_per_macro_batch(self.experiment)
        batches = (self.position.samples - self.position.macro_batch * size) // self.experiment.data.batch_size
        name = snapshot_name(self.position.macro_batch, batches)
        if name != self.saved:
            self._check_weights()
            state = {
                "position": self.position.state_dict(),
                "meter": self.meter.state_dict(self.ranks),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "early_stopping": self.early_stopping.state_dict(),
                "spikes": self.spikes.state_dict(),
                "checkpoints": self.checkpoints.state_dict(),
                "trackers": self.trackers.state_dict(),
                "random": self.ranks.gather(RandomState(self.device).state_dict()),
            }
            self.snapshots.save(name, state)
            self.saved = name

    def save_last_snapshot(self) -> None:
        """Saves where the run ends and waits for it; on a full disk tries again, for then nothing else has the state.

        Raises:
            RunFailedError: it could not be saved within `saving.patience` seconds.
        """
        patience = self.experiment.saving.patience
        for waited in range(0, patience + 1, PAUSE):
            self.save_snapshot()
            reason = self.snapshots.wait()
            if not reason:
                return
            self.saved = ""
            if waited == 0 and patience:
                self.progress.log(f"trying again for {patience} s; make room, or end without it by Ctrl-C twice")
            if waited + PAUSE <= patience:
                time.sleep(PAUSE)
        path, _ = newest_snapshot(self.run / "snapshots", self.ranks)
        where = f"resume goes on from {path}" if path else "resume begins anew"
        raise RunFailedError(f"the last snapshot could not be saved: {reason}; {where}")

    def _restore(self) -> dict[str, Any]:
        """Puts every part where the newest good snapshot left it; without one, loads `init_from`."""
        path = self._newest_snapshot()
        if path is None:
            self._initialise()
            return {}
        return self._load(path)

    def _load(self, path: Path) -> dict[str, Any]:
        live = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with parsing(path):
            state = load_snapshot(path, live, self.snapshots.group)
        with parsing(path, RuntimeError):
            self.position.load_state_dict(state["position"])
            self.meter.load_state_dict(state["meter"], self.ranks)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.early_stopping.load_state_dict(state["early_stopping"])
            if "spikes" in state:  # not in snapshots of version 0.1.0
                self.spikes.load_state_dict(state["spikes"])
            self.checkpoints.load_state_dict(state["checkpoints"])
            if self.ranks.rank < len(state["random"]):
                RandomState(self.device).load_state_dict(state["random"][self.ranks.rank])
        self.saved = path.name
        self.progress.log(f"going on from {path}, step {self.position.step:,}")
        return state

    def _newest_snapshot(self) -> Path | None:
        """The newest good snapshot; cleans up after a crash, and sets damaged ones aside.

        Raises:
            UserError: there are some, but none is whole; to begin anew would lose what else the run has.
        """
        folder = self.run / "snapshots"
        if self.ranks.is_main:
            for place in (self.run, folder, self.run / "checkpoints"):
                recover_folder(place)
        path = self._newest_snapshot_in(folder)
        if path is None and self.ranks.from_main(list_snapshots(folder)):
            raise UserError(
                f"no snapshot in {folder} is whole; remove the folder to begin anew, or start another run with "
                f"init_from={str(self.run)!r}"
            )
        if path is not None and self.ranks.is_main:
            set_aside(folder, path)
        return path

    def _newest_snapshot_in(self, folder: Path) -> Path | None:
        path, complaints = newest_snapshot(folder, self.ranks)
        for line in complaints:
            self.progress.log(line + ("; using the one before it" if path else ""))
        return path

    def _initialise(self) -> None:
        """Fine-tuning: takes the weights of `init_from` that fit, and says which do not; perhaps moments as well."""
        source = self.experiment.init_from
        if source is None:
            return
        checkpoint = open_checkpoint(source)
        same = same_tokens(checkpoint.tokenizer, self.store.tokenizer)
        differing = config_mismatches(checkpoint.config, self.experiment.model)
        differing += load_matching_weights(self.model, checkpoint.weights, same)
        if not same:
            differing.append("its tokenizer is not the corpus's, so token ids may mean other texts")
        self.progress.log(f"starting from the weights of {checkpoint.folder}")
        if self.experiment.fine_tuning.optimizer_state == "kept":
            snapshot = self._newest_snapshot_in(find_moments(source))
            if snapshot is None:
                raise UserError(f"fine_tuning.optimizer_state is 'kept', but no snapshot of {source} is whole")
            differing.append(load_moments(self.optimizer, snapshot, self.snapshots.group))
        for line in differing:
            self.progress.log(f"  {line}")

    # Figures ------------------------------------------------------------------------------------------------------

    def _figures(self, val_loss: float) -> dict[str, float | int | None]:
        experiment, meter, position = self.experiment, self.meter, self.position
        (train_loss,) = self.ranks.sum(meter.sums[0].item() / max(meter.targets, 1))
        waited, peaks = zip(*self.ranks.gather((meter.waited, peak_memory(self.device))), strict=True)
        splits = {name: store.splits["val"] for name, store in stores(self.store).items()}
        return {
            "macro_batch": position.macro_batch,
            "step": position.step,
            "samples": position.samples,
            "tokens": position.samples * experiment.data.seq_len,
            "train_loss": train_loss,
            "val_loss": val_loss,
            **loss_figures(val_loss, splits.get("")),
            **source_figures("val_loss", self.val_losses, splits),
            **self._score(),
            "lr": meter.lr,
            "weight_decay": meter.weight_decay,
            "training_batch_size": meter.samples / meter.steps,
            "grad_norm": meter.sums[1].item() / meter.steps,
            **self.stream.progress(position.samples),
            **self._throughput(meter.seconds),
            "step_time": meter.seconds / meter.steps,
            "data_wait_share": max(waited) / meter.seconds,
            "time_trained": position.time_trained,
            "peak_memory": None if None in peaks else max(peaks),
            "skipped_steps": int(self.optimizer.skipped[0].item()),
            **self._left_out(),
        }

    def _left_out(self) -> dict[str, int]:
        """What spikes of the loss have cost, where they are watched for."""
        samples = sum(end - start for start, end in self.position.skipped_ranges)
        return {"rollbacks": self.spikes.rollbacks, "samples_left_out": samples} if self.spikes.enabled else {}

    def _score(self) -> dict[str, float]:
        """The corpus's task score (those of a mixture's sources), on the same few validation samples every time."""
        wanted, count = tasks(self.experiment.corpus), self.experiment.tracking.score_samples
        if not wanted or not count:
            return {}
        self.model.eval()
        with uncompiled():
            return {
                of_source(task, name): SCORES[task](self.model, store.splits["val"], count, self.device)
                for name, store in stores(self.store).items()
                if (task := wanted.get(name))
            }

    def _update_progress(self, seconds: float) -> None:
        """Shows the macro-batch so far; reading the loss waits for the device, so this is done a few times a second."""
        self.failing = self._skipped_too_many()
        batches = self.position.samples // self.experiment.data.batch_size
        self.progress.update(
            batches,
            {
                # Of this process's part of the targets, which stands for all.
                "train_loss": self.meter.sums[0].item() * self.ranks.world_size / max(self.meter.targets, 1),
                "lr": self.meter.lr,
                "visited_share": self.stream.progress(self.position.samples)["visited_share"],
                **self._throughput(seconds),
            },
        )

    def _throughput(self, seconds: float) -> dict[str, float | None]:
        """Tokens per second of the macro-batch so far, and their share of all devices' peak where that is known."""
        seq_len, peak = self.experiment.data.seq_len, peak_flops(self.device)
        rate = self.meter.samples * seq_len / seconds
        flops = rate * flops_per_token(self.model, seq_len) / self.ranks.world_size
        return {"tokens_per_second": rate, "mfu": flops / peak if peak else None}

    # Numbers gone wrong ------------------------------------------------------------------------------------------

    def roll_back_at_spike(self) -> bool:
        """Where the loss has spiked, goes back to a snapshot and leaves out batches up to the spike's; else False.

        After Chowdhery et al. 2022 ("PaLM", section 5.1), who did it by hand.
        """
        found = self.spikes.judge(self.ranks)
        if self.spikes.enabled and found is None and self._not_finite():
            found = self.position.samples
        if found is None:
            return False
        training, data, step = self.experiment.training, self.experiment.data, self.position.step
        begin, rollbacks = found - training.spike_skip * data.batch_size, self.spikes.rollbacks
        self._read_clock()
        path, spent = self._snapshot_before(begin), self.position.time_trained
        if path is None or rollbacks >= training.max_rollbacks:
            why = "no whole snapshot is left" if path is None else f"training.max_rollbacks is {rollbacks}"
            raise DivergedError(f"the loss has spiked before step {step:,}, and {why}; a lower optimizer.lr may help")
        first, last = self.stream.place(max(begin, self._samples(path))), self.stream.place(found - 1) + 1
        skipped_ranges = add_range(self.position.skipped_ranges, first, last)
        state = self._load(path)
        self.position.skipped_ranges, self.position.time_trained = skipped_ranges, spent
        self.spikes.rollbacks, self.failing = rollbacks + 1, False
        self.trackers.rewind(state["trackers"], self.position.macro_batch)
        self.loader.close()
        self.loader = self._open_loader()
        self.progress.log(f"the loss has spiked; samples {first:,} to {last - 1:,} of the data are left out")
        return True

    def _snapshot_before(self, samples: int) -> Path | None:
        """Of the whole snapshots at the end of macro-batches, the newest before a position, else the oldest.

        Those that a signal has left are passed over: a run without signals has not got them.
        """
        self.snapshots.wait()
        found: list[Path] = self.ranks.from_main(list_snapshots(self.snapshots.folder))
        paths = [path for path in found if "_" not in path.name]
        older = [path for path in paths if self._samples(path) <= samples]
        newer = [path for path in reversed(paths) if path not in older]
        for path in older + newer:
            if not any(self.ranks.gather(find_corruption(path, self.ranks.rank, self.ranks.world_size))):
                return path
        return None

    def _samples(self, snapshot: Path) -> int:
        """The position of a snapshot at the end of a macro-batch."""
        return int(snapshot.name.removeprefix("mb")) * samples_per_macro_batch(self.experiment)

    def _not_finite(self) -> str:
        """The first weight or moment that is not finite, on any process; empty: there is none."""
        moments = self.optimizer.state_dict()["moments"].items()
        tensors = dict(self.model.named_parameters())
        tensors |= {f"{key} of {name}": tensor for name, entry in moments for key, tensor in entry.items()}
        return next(filter(None, self.ranks.gather(first_not_finite(tensors))), "")

    def _check_weights(self) -> None:
        """Ends the run before weights that are not finite take the place of good ones in snapshots."""
        if name := self._not_finite():
            raise DivergedError(f"{name} is not finite after step {self.position.step:,}; {self._last_good()}")

    def _check_skipped(self) -> None:
        """Ends the run when too many steps in a row had a loss or gradient that was not finite."""
        if not self._skipped_too_many():
            return
        if self.spikes.enabled:
            self.spikes.judge(self.ranks)
            return
        limit = self.experiment.training.max_skipped_steps
        raise DivergedError(
            f"{limit} steps in a row up to step {self.position.step:,} had a loss or gradient that is not finite; "
            f"{self._last_good()}"
        )

    def _last_good(self) -> str:
        self.snapshots.wait()
        path, _ = newest_snapshot(self.run / "snapshots", self.ranks)
        where = f"the last good snapshot is {path}" if path else "there is no snapshot yet"
        return f"{where}; a lower optimizer.lr or longer schedule.lr.warmup may help"

    def _skipped_too_many(self) -> bool:
        return int(self.optimizer.skipped[2].item()) >= self.experiment.training.max_skipped_steps

    # Start and end ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        training = self.experiment.training
        done = self.position.samples // self.experiment.data.batch_size
        self.progress.start(training.num_macro_batches, training.batches_per_macro_batch, done)
        self._clock = time.perf_counter()
        self._note(None)
        if self.spikes.enabled and not self.saved:
            self.save_snapshot()  # so that there is one to go back to

    def _ended(self) -> str:
        """Why the run is over; empty while it is not."""
        if self.stopping:
            return "interrupted"
        if self.position.macro_batch >= self.experiment.training.num_macro_batches:
            return "finished"
        return "stopped early" if self.early_stopping.should_stop else ""

    def _agree_to_stop(self) -> bool:
        """Whether any process has been asked to stop or has no more time; all get the same answer.

        Where one has been asked to save, all save now; where one must fail, all do.
        """
        asked, late, save, failing = self.ranks.sum(
            self.stop.requested is not None, self.deadline.near(self.snapshots.longest), self.stop.save_requested,
            self.failing,
        )  # fmt: skip
        if failing:
            self._check_skipped()
        if late and not self.stopping:
            self.progress.log(f"{max(self.deadline.left, 0):.0f} s before the time limit: saving")
        self.stopping = asked + late > 0
        if self.stopping:
            self.reason = self.reason or ("signal" if asked else "time limit")
        if save and not self.stopping and self.spikes.judge(self.ranks) is None:
            self.stop.save_requested = False
            self.save_snapshot()
            self.progress.log(f"saving {self.snapshots.folder / self.saved}")
        return self.stopping

    def _end(self, status: str) -> None:
        self.snapshots.close()
        self.progress.close()
        self._note(status)
        self.trackers.close(status)
        self.loader.close()

    def _note(self, status: str | None) -> None:
        """Leaves word of how the run has ended, where there is room for it on the disk."""
        if self.ranks.is_main:
            with contextlib.suppress(OSError):
                write_status(self.run, status, self.reason)

    def _read_clock(self) -> None:
        now = time.perf_counter()
        self.position.time_trained += now - self._clock
        self._clock = now
