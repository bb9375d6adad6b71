"""What a run tells, and to whom: figures to files, Weights & Biases and TensorBoard; a bar, plots and a report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cleangpt.config import TrackingConfig
from cleangpt.errors import require
from cleangpt.experiment import Experiment
from cleangpt.tracking.metrics import MetricsFiles
from cleangpt.tracking.progress import log_to_stderr

FILES = "files"
"""The name under which the state of the metrics files stands among that of the trackers."""


class Tracker(Protocol):
    """Whoever wants to know how a run goes."""

    def open(self, truncate_after: int | None) -> None:
        """Starts, after `load_state_dict`; the macro-batches after `keep_until` will be told again (None: all)."""

    def record(self, figures: Mapping[str, float | int | None]) -> None:
        """Takes the figures of one macro-batch; keys as in `metrics.FIGURES`."""

    def sample(self, macro_batch: int, text: str) -> None:
        """Takes a text sampled from the model when a checkpoint is saved."""

    def close(self, status: str) -> None:
        """Ends; `status` is one of finished, stopped early, interrupted, failed."""

    def state_dict(self) -> dict[str, Any]:
        """What the next part of the same run must know, fit for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned; before `open`."""


class Trackers:
    """Tells the metrics files, which write later what they cannot now, and others; one that fails is left out."""

    def __init__(self, files: MetricsFiles, others: dict[str, Tracker], log: Callable[[str], None]) -> None:
        self._files, self._others, self._say = files, others, log
        self._working = dict(others)
        self._unused: dict[str, Any] = {}
        self._states: dict[str, dict[str, Any]] = {}
        """What each of the others told last."""

    def open(self, truncate_after: int | None, last_step: int = 0) -> None:
        """Opens every tracker."""
        self._files.open(truncate_after)
        self._update_progress(lambda tracker: tracker.open(truncate_after))

    def record(self, figures: Mapping[str, float | int | None]) -> None:
        """Tells all the figures of one macro-batch."""
        self._files.record(figures)
        self._update_progress(lambda tracker: tracker.record(figures))

    def log_steps(self, rows: Any) -> None:
        """Takes points."""

    def sample(self, macro_batch: int, text: str) -> None:
        """Tells all a text that the model wrote after `macro_batch`."""
        self._files.sample(macro_batch, text)
        self._update_progress(lambda tracker: tracker.sample(macro_batch, text))

    def rewind(self, state: dict[str, Any], truncate_after: int) -> None:
        """Goes back to a snapshot's `state`: the macro-batches after `keep_until` will be told again."""
        self._files.load_state_dict(state.get(FILES, {}))
        self._files.open(truncate_after)

    def close(self, status: str) -> None:
        """Ends all; `status` is one of finished, stopped early, interrupted, failed."""
        self._files.close(status)
        self._update_progress(lambda tracker: tracker.close(status))
        self._working.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state of each by name; of one that is left out or switched off as well, so that it may come back."""
        for name in self._others:
            self._try(name, lambda name, tracker: self._states.update({name: tracker.state_dict()}))
        return self._unused | self._states | {FILES: self._files.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Gives each its part of what `state_dict` returned; before `open`."""
        self._unused = {name: part for name, part in state.items() if name not in self._others and name != FILES}
        self._files.load_state_dict(state.get(FILES, {}))
        for name in self._others:
            self._states[name] = state.get(name, {})
            self._try(name, lambda name, tracker: tracker.load_state_dict(self._states[name]))

    def _update_progress(self, action: Callable[[Tracker], None]) -> None:
        for name in list(self._working):
            self._try(name, lambda _, tracker: action(tracker))

    def _try(self, name: str, action: Callable[[str, Tracker], None]) -> None:
        try:
            action(name, self._others[name])
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if self._working.pop(name, None) is not None:
                self._say(f"{name} is left out from now on, training goes on without it: {reason}")


class NullTracker(Trackers):
    """What the processes have that do not speak for the run."""

    def __init__(self, run: Path) -> None:
        super().__init__(MetricsFiles(run), {}, lambda _: None)

    def record(self, figures: Mapping[str, float | int | None]) -> None:
        """Tells nobody."""

    def sample(self, macro_batch: int, text: str) -> None:
        """Tells nobody."""

    def rewind(self, state: dict[str, Any], truncate_after: int) -> None:
        """Forgets nothing."""


def check_tracking(config: TrackingConfig) -> None:
    """Makes sure that the packages of the trackers asked for are there.

    Raises:
        UserError: one is not installed; names the extra that brings it.
    """
    if config.wandb != "disabled":
        require("wandb", "wandb")
    if config.tensorboard:
        require("tensorboard", "tensorboard")


def create_trackers(
    experiment: Experiment, experiment_json: dict[str, Any], run: Path, log: Callable[[str], None]
) -> Trackers:
    """The trackers that an experiment asks for, for the run in the folder `run`; to be opened.

    Args:
        experiment: what is trained.
        experiment_json: the same as JSON, shown beside the metrics.
        run: its folder.
        log: told about a tracker that fails.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    check_tracking(experiment.tracking)
    others: dict[str, Tracker] = {}
    if experiment.tracking.wandb != "disabled":
        from cleangpt.tracking.wandb import WandbTracker

        others["wandb"] = WandbTracker(experiment, experiment_json, run)
    if experiment.tracking.tensorboard:
        from cleangpt.tracking.tensorboard import TensorBoardTracker

        others["tensorboard"] = TensorBoardTracker(experiment_json, run)
    return Trackers(MetricsFiles(run, log), others, log)


def open_trackers(
    experiment: Experiment,
    experiment_json: dict[str, Any],
    run: Path,
    state: dict[str, Any] | None,
    truncate_after: int | None,
    log: Callable[[str], None] | None = None,
) -> Trackers:
    """Opens the trackers that an experiment asks for, for the run in the folder `run`.

    Args:
        experiment_json: the experiment as JSON, shown beside the figures.
        state: what `Trackers.state_dict` returned in the snapshot gone on from; None for a new run.
        keep_until: last macro-batch of that snapshot; what the files tell of later ones is removed. None: all of it.
        say: told of a tracker that fails; without it, the terminal and log.txt are.

    Raises:
        UserError: the package of a tracker is not installed, or metrics.jsonl is damaged.
        OSError: the lines of metrics.jsonl that are told again cannot be removed.
    """
    log = log or (lambda text: log_to_stderr(run, text))
    trackers = create_trackers(experiment, experiment_json, run, log)
    trackers.load_state_dict(state or {})
    trackers.open(truncate_after)
    return trackers
