"""Trackers as a run opens them: made, given the state of a snapshot, and opened."""

from rich.console import Console

from cleangpt.tracking import create_trackers
from cleangpt.tracking.progress import ProgressBar


def open_trackers(config, run, *, experiment_json, state=None, truncate_after=None, last_step=None, log=None):
    trackers = create_trackers(
        config, run, "tiny", experiment_json, log or ProgressBar(run, console=Console(stderr=True)).log
    )
    trackers.load_state_dict(state or {})
    trackers.open(truncate_after, last_step)
    return trackers
