"""Recovery from loss spikes and non-finite weights by rolling back to a good snapshot."""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cleangpt.checkpoints.snapshots import list_snapshots
from cleangpt.config import TrainingConfig
from cleangpt.data.source import BatchSource
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import local_tensor
from cleangpt.errors import DivergedError
from cleangpt.files import find_corruption
from cleangpt.models.base import LanguageModel
from cleangpt.tracking import Trackers
from cleangpt.training.meter import StepResult
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.saving import Saver
from cleangpt.training.state import Length, Position


class SpikeDetector:
    """Finds the step at which the loss spiked, or at which too many consecutive steps were skipped.

    Losses stay on the device until `detect` reads them, before the weights are saved or validated. The result depends
    on the losses alone, not on when they are read, so a resumed run finds the same step; see docs/reliability.md.
    """

    def __init__(self, config: TrainingConfig, ranks: Ranks) -> None:
        self.config, self._ranks = config, ranks
        self.enabled = config.spike_threshold is not None
        self.recent: deque[float] = deque(maxlen=config.spike_window)
        """Losses of the last steps, without skipped ones."""
        self.skipped = 0
        """Consecutive steps skipped until now."""
        self.rollbacks = 0
        self.found: int | None = None
        """The position in samples after the step that was found; None: no spike."""
        self._unread: list[tuple[int, Tensor]] = []

    def observe(self, end: int, step: StepResult) -> None:
        """Adds the step that ended at a position."""
        if self.enabled:
            loss = step.loss / max(step.count, 1)
            self._unread.append((end, torch.where(step.skipped > 0, math.nan, loss)))

    def detect(self) -> int | None:
        """Reads the losses observed since the last call, on all processes together; returns `found`."""
        if not self._unread:
            return self.found
        ends, parts = zip(*self._unread, strict=True)
        self._unread.clear()
        for end, loss in zip(ends, self._ranks.sum(*torch.stack(parts).tolist()), strict=True):
            if self.found is None and self._is_spike(loss):
                self.found = end
        return self.found

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            self.skipped += 1
            return self.skipped >= self.config.max_skipped_steps
        self.skipped = 0
        full, allowed = len(self.recent) == self.config.spike_window, self.config.spike_threshold or 0.0
        if full and loss > math.fsum(self.recent) / len(self.recent) + allowed:
            return True
        self.recent.append(loss)
        return False

    def state_dict(self) -> dict[str, Any]:
        """The state for a snapshot, after reading all losses."""
        return {"recent": list(self.recent), "skipped": self.skipped, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.recent = deque(state["recent"], self.config.spike_window)
        self.skipped, self.rollbacks = state["skipped"], state["rollbacks"]
        self.found = None
        self._unread.clear()


class Health:
    """Checks whether weights, moments and gradients are finite."""

    def __init__(self, model: LanguageModel, optimizer: Optimizer, ranks: Ranks, max_skipped_steps: int) -> None:
        self.model, self.optimizer, self.ranks, self.max_skipped_steps = model, optimizer, ranks, max_skipped_steps

    def not_finite(self) -> str:
        """The first weight or moment that is not finite, on any process; empty if all are finite."""
        moments = self.optimizer.state_dict()["moments"].items()
        tensors = dict(self.model.named_parameters())
        tensors |= {f"{key} of {name}": tensor for name, entry in moments for key, tensor in entry.items()}
        return next(filter(None, self.ranks.all_gather(first_not_finite(tensors))), "")

    def skipped_too_many(self) -> bool:
        """Whether the limit of consecutive skipped steps has been reached; waits for the device."""
        return int(self.optimizer.skipped[2].item()) >= self.max_skipped_steps


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a NaN or an infinity in this process's shard; empty if there is none.

    Synchronizes with the device once, unless there is one.
    """
    parts = {name: local_tensor(tensor).detach() for name, tensor in tensors.items()}
    parts = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    if not parts or torch.nn.utils.get_total_norm(parts.values(), math.inf).isfinite():
        return ""
    return next(name for name, part in parts.items() if not part.isfinite().all())


class Recovery:
    """After a loss spike, returns to a snapshot and skips the batches that led to the spike.

    Chowdhery et al. 2022 ("PaLM", section 5.1) did so by hand.
    """

    def __init__(
        self, spikes: SpikeDetector, health: Health, saver: Saver, source: BatchSource, trackers: Trackers,
        position: Position, length: Length,
    ) -> None:  # fmt: skip
        self.spikes, self.health, self.saver, self.source = spikes, health, saver, source
        self.trackers, self.position, self.length = trackers, position, length

    def roll_back(self) -> bool:
        """Rolls back if the loss has spiked, or, with spike detection, if weights are not finite.

        Raises:
            DivergedError: too many rollbacks, or no snapshot to return to.
        """
        found, position = self.spikes.detect(), self.position
        if self.spikes.enabled and found is None and self.health.not_finite():
            found = position.samples
        if found is None:
            return False
        config, step, rollbacks = self.spikes.config, position.step, self.spikes.rollbacks
        begin = found - config.spike_skip * self.length.batch_size
        path, spent = self._snapshot_before(begin), position.read_clock()
        if path is None or rollbacks >= config.max_rollbacks:
            why = "no intact snapshot is left" if path is None else f"training.max_rollbacks is {rollbacks}"
            raise DivergedError(f"the loss has spiked before step {step:,}, and {why}; a lower optimizer.lr may help")
        first = max(begin, self._samples(path))
        self.source.skip(first, found)
        state = self.saver.load(path, without=("trackers",))
        position.time_trained, self.spikes.rollbacks = spent, rollbacks + 1
        self.trackers.rewind(state["trackers"], position.macro_batch, position.step)
        self.saver.log(f"the loss has spiked; {found - first:,} samples are skipped from now on")
        return True

    def metrics(self) -> dict[str, int]:
        """Rollbacks and skipped samples so far, with spike detection."""
        skipped = sum(end - start for start, end in self.source.state_dict().get("skipped_ranges", []))
        return {"rollbacks": self.spikes.rollbacks, "samples_left_out": skipped} if self.spikes.enabled else {}

    def check_weights(self) -> None:
        """Ends the run before non-finite weights replace good ones.

        Raises:
            DivergedError: names the first weight or moment that is not finite, and the last good snapshot.
        """
        if name := self.health.not_finite():
            raise DivergedError(f"{name} is not finite after step {self.position.step:,}; {self.saver.last_good()}")

    def check_skipped(self) -> None:
        """Ends the run, or triggers a rollback, if too many consecutive steps were skipped.

        Raises:
            DivergedError: names the last good snapshot.
        """
        if not self.health.skipped_too_many():
            return
        if self.spikes.enabled:
            self.spikes.detect()
            return
        raise self._diverged(self.health.max_skipped_steps)

    def check_last_steps(self) -> None:
        """Ends a run whose validation loss at its end is not finite, if its last steps were skipped, too.

        Raises:
            DivergedError: names the last good snapshot.
        """
        if streak := int(self.health.optimizer.skipped[1].item()):
            raise self._diverged(streak)

    def _diverged(self, skipped: int) -> DivergedError:
        return DivergedError(
            f"{skipped} steps in a row up to step {self.position.step:,} had a loss or gradient that is not finite; "
            f"{self.saver.last_good()}"
        )

    def _snapshot_before(self, samples: int) -> Path | None:
        """The newest intact snapshot at the end of a macro-batch before a position, else the oldest.

        Snapshots saved on a signal are ignored, since a run without signals does not have them.
        """
        snapshots, ranks = self.saver.snapshots, self.health.ranks
        snapshots.wait()
        found: list[Path] = ranks.broadcast(list_snapshots(snapshots.folder))
        paths = [path for path in found if "_" not in path.name]
        older = [path for path in paths if self._samples(path) <= samples]
        newer = [path for path in reversed(paths) if path not in older]
        for path in older + newer:
            if not any(ranks.all_gather(find_corruption(path, ranks.rank, ranks.world_size))):
                return path
        return None

    def _samples(self, snapshot: Path) -> int:
        """The position of a snapshot at the end of a macro-batch."""
        return int(snapshot.name.removeprefix("mb")) * self.length.samples_per_macro_batch
