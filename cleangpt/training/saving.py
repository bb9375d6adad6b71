"""Saving snapshots of a run, and restoring the newest."""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cleangpt.checkpoints.snapshots import (
    Snapshots,
    list_snapshots,
    load_snapshot,
    newest_snapshot,
    quarantine,
    snapshot_name,
)
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import RunFailedError, UserError, parsing
from cleangpt.files import recover_folder
from cleangpt.training.state import Length, Position, TrainState

PAUSE = 10
"""Seconds between two attempts to save the last snapshot of a run."""


class Saver:
    """Saves the state of a run, and restores it; all processes call it together."""

    def __init__(
        self, run: Path, state: TrainState, position: Position, length: Length, snapshots: Snapshots, ranks: Ranks,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.run, self.state, self.position, self.length = run, state, position, length
        self.snapshots, self.ranks, self.log = snapshots, ranks, log
        self.saved = ""
        """The name of the newest snapshot that is saved or being saved; empty if that failed."""

    def save(self, check: Callable[[], None]) -> None:
        """Saves a snapshot of the current position, unless there is one; it is written while training continues.

        If it cannot be written, training continues until the next. `check` is called before saving.
        """
        if self.snapshots.wait():
            self.saved = ""
        rest = self.position.samples - self.position.macro_batch * self.length.samples_per_macro_batch
        name = snapshot_name(self.position.macro_batch, rest // self.length.batch_size)
        if name != self.saved:
            check()
            self.snapshots.save(name, self.state.state_dict())
            self.saved = name

    def save_last(self, check: Callable[[], None]) -> None:
        """Saves the last snapshot of a run and waits until it is written; on a full disk, retries, since no other copy
        of the state exists.

        Raises:
            RunFailedError: it could not be saved within `saving.patience` seconds.
        """
        patience = self.snapshots.config.patience
        for waited in range(0, patience + 1, PAUSE):
            self.save(check)
            reason = self.snapshots.wait()
            if not reason:
                return
            self.saved = ""
            if waited == 0 and patience:
                self.log(f"trying again for {patience} s; free some space, or press Ctrl-C twice to end without it")
            if waited + PAUSE <= patience:
                time.sleep(PAUSE)
        path, _ = newest_snapshot(self.snapshots.folder, self.ranks)
        where = f"resume continues from {path}" if path else "resume starts from the beginning"
        raise RunFailedError(f"the last snapshot could not be saved: {reason}; {where}")

    def restore(self) -> dict[str, Any] | None:
        """Restores the newest intact snapshot and returns its state; None: the run has none.

        Cleans up after a crash, and quarantines corrupt snapshots.

        Raises:
            UserError: every snapshot is corrupt; restarting would overwrite the rest of the run.
        """
        folder = self.snapshots.folder
        if self.ranks.is_main:
            for place in (self.run, folder, self.run / "checkpoints"):
                recover_folder(place)
        path = find_newest(folder, self.ranks, self.log)
        if path is None:
            if self.ranks.broadcast(list_snapshots(folder)):
                raise UserError(
                    f"every snapshot in {folder} is corrupt, and restarting would overwrite the run; remove the folder "
                    f"to restart anyway, or start another run with init_from={str(self.run)!r}"
                )
            return None
        state = self.load(path)
        if self.ranks.is_main:
            quarantine(folder, path)
        self.log(f"resuming from {path}, step {self.position.step:,}")
        return state

    def load(self, path: Path, without: Collection[str] = ()) -> dict[str, Any]:
        """Restores every part from a snapshot, except those in `without`; returns the full state."""
        with parsing(path):
            state = load_snapshot(path, self.state.tensors(), self.snapshots.group)
        with parsing(path, RuntimeError):
            self.state.load_state_dict(state, without)
        self.saved = path.name
        return state

    def last_good(self) -> str:
        """The advice for a run that has diverged: its last good snapshot, and what may help."""
        self.snapshots.wait()
        path, _ = newest_snapshot(self.snapshots.folder, self.ranks)
        where = f"the last good snapshot is {path}" if path else "there is no snapshot yet"
        return f"{where}; a lower optimizer.lr or longer schedule.lr.warmup may help"


def find_newest(folder: Path, ranks: Ranks, log: Callable[[str], None]) -> Path | None:
    """The newest intact snapshot in a folder; logs a line about each newer one that is corrupt."""
    path, complaints = newest_snapshot(folder, ranks)
    for line in complaints:
        log(line + ("; using the one before it" if path else ""))
    return path
