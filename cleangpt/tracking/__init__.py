"""What a run reports: metrics to files, Weights & Biases and TensorBoard; a progress bar, plots and a report."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cleangpt.config import TrackingConfig
from cleangpt.errors import UserError, require
from cleangpt.tracking.metrics import MetricsFiles, Value

FILES = "files"
"""Name of the metrics files among the states of the trackers."""


class Tracker(Protocol):
    """A destination for a run's metrics.

    Steps and macro-batches ascend. The rows of a macro-batch's steps come before its metrics, and these before its
    sample.
    """

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Starts tracking, after `load_state_dict`. The run continues after this macro-batch and step; None: a new run.

        Called again when the run returns to an earlier snapshot.

        Raises:
            UserError: a setting cannot work; any other error drops the tracker.
        """

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Logs the metrics of one macro-batch; keys as in `metrics.METRICS`."""

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Logs the metrics of some steps, one row each; keys as in `metrics.STEP_METRICS`."""

    def sample(self, macro_batch: int, text: str) -> None:
        """Logs a text sampled from the model when a checkpoint was saved."""

    def close(self, status: str) -> None:
        """Ends tracking; `status` is finished, stopped early, interrupted or failed."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a snapshot, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; called before `open`."""


class Trackers:
    """The metrics files, which retry failed writes, and other trackers, each dropped if it fails."""

    def __init__(self, files: MetricsFiles, others: dict[str, Tracker], log: Callable[[str], None]) -> None:
        self._files, self._others, self._log = files, others, log
        self._working = dict(others)
        self._unused: dict[str, Any] = {}
        self._states: dict[str, dict[str, Any]] = {}
        """The last known state of each other tracker."""

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Opens every tracker; the run continues after this macro-batch and step (None: a new run).

        Raises:
            UserError: one of them refuses a setting; the files are as they were.
        """
        self._call("open", truncate_after, last_step)
        self._files.open(truncate_after, last_step)

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Logs the metrics of one macro-batch to every tracker."""
        self._files.record(metrics)
        self._call("record", metrics)

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Logs the metrics of some steps, in order, one row each; called with a few dozen rows at a time."""
        self._files.log_steps(rows)
        self._call("log_steps", rows)

    def sample(self, macro_batch: int, text: str) -> None:
        """Logs a text sampled from the model after `macro_batch`."""
        self._files.sample(macro_batch, text)
        self._call("sample", macro_batch, text)

    def answers(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes the answers of a round of rollouts to their file."""
        self._files.answers(lines)

    def rewind(self, state: dict[str, Any], truncate_after: int, last_step: int) -> None:
        """Returns to a snapshot with this `state`, macro-batch and step; later steps will be logged again."""
        self.load_state_dict(state)
        self.open(truncate_after, last_step)

    def close(self, status: str) -> None:
        """Closes every tracker; `status` is finished, stopped early, interrupted or failed."""
        self._files.close(status)
        self._call("close", status)
        self._working.clear()

    def state_dict(self) -> dict[str, Any]:
        """Each tracker's state by name, including those dropped or disabled, so that they can be resumed later."""
        for name, tracker in self._others.items():
            try:
                self._states[name] = tracker.state_dict()
            except Exception as error:
                self._drop(name, error)
        return self._unused | self._states | {FILES: self._files.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores each tracker's part of `state_dict`; called before `open`."""
        self._unused = {name: part for name, part in state.items() if name not in self._others and name != FILES}
        self._files.load_state_dict(state.get(FILES, {}))
        for name, tracker in self._others.items():
            self._states[name] = state.get(name, {})
            try:
                tracker.load_state_dict(self._states[name])
            except Exception as error:
                self._drop(name, error)

    def _call(self, method: str, *arguments: Any) -> None:
        """Calls a method of every tracker that still works."""
        for name, tracker in list(self._working.items()):
            try:
                getattr(tracker, method)(*arguments)
            except UserError:
                raise
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        if self._working.pop(name, None) is not None:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._log(f"{name} failed and is dropped, training continues without it: {reason}")


class NullTracker(Trackers):
    """Logs nothing, on processes other than the main one."""

    def __init__(self, run: Path) -> None:
        super().__init__(MetricsFiles(run), {}, lambda _: None)

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Does nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Does nothing."""

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Does nothing."""

    def sample(self, macro_batch: int, text: str) -> None:
        """Does nothing."""

    def answers(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Does nothing."""

    def rewind(self, state: dict[str, Any], truncate_after: int, last_step: int) -> None:
        """Does nothing."""

    def close(self, status: str) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def check_tracking(config: TrackingConfig) -> None:
    """Checks that the packages of the requested trackers are installed, and that Weights & Biases can log in.

    Raises:
        UserError: a package is missing, or a key.
    """
    if config.wandb != "disabled":
        require("wandb")
    if config.wandb == "online" and os.environ.get("RANK", "0") == "0":  # the process that tracks
        from cleangpt.tracking.wandb import check_login

        check_login()
    if config.tensorboard:
        require("tensorboard")


def create_trackers(
    config: TrackingConfig, run: Path, name: str, experiment_json: dict[str, Any], log: Callable[[str], None]
) -> Trackers:
    """The configured trackers for the run in the folder `run`, not yet open.

    Args:
        config: which trackers.
        run: folder of the run.
        name: of the experiment.
        experiment_json: the experiment as JSON, logged next to the metrics.
        log: called with a message if a tracker fails.

    Raises:
        UserError: as `check_tracking`.
    """
    check_tracking(config)
    others: dict[str, Tracker] = {}
    if config.wandb != "disabled":
        from cleangpt.tracking.wandb import WandbTracker

        others["wandb"] = WandbTracker(config, name, experiment_json, run)
    if config.tensorboard:
        from cleangpt.tracking.tensorboard import TensorBoardTracker

        others["tensorboard"] = TensorBoardTracker(experiment_json, run)
    return Trackers(MetricsFiles(run, log), others, log)
