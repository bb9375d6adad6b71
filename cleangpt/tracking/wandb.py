"""Figures and samples for Weights & Biases, online or offline; needs cleangpt[wandb].

The id of the W&B run is chosen here and kept in the snapshot, so that a resumed run goes on in the same W&B run.
W&B cannot take back what it was told: macro-batches that a resumed run does again are not told twice, where W&B
remembers them (online). Offline, each part of a run leaves a folder RUN/wandb/offline-run-…, all with one id;
``wandb sync --append`` brings them, oldest first, into one W&B run.
"""

import html
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cleangpt.errors import require
from cleangpt.experiment import Experiment

FINISH_SECONDS = 60
"""How long the end of a run waits for what was not sent yet; it stays in RUN/wandb, for ``wandb sync``."""


class WandbTracker:
    """Logs every figure against the macro-batch, with the experiment as the run's config."""

    def __init__(self, experiment: Experiment, experiment_json: dict[str, Any], run: Path) -> None:
        self._tracking, self._name = experiment.tracking, f"{experiment.name} {run.name}"
        self._experiment, self._folder = experiment_json, run
        self._id = uuid.uuid4().hex[:16]
        self._resumed = False
        self._run: Any = None
        self._told = -1

    def open(self, truncate_after: int | None) -> None:
        """Starts the W&B run or goes on with it."""
        wandb = require("wandb", "wandb")
        online = self._tracking.wandb == "online"
        self._run = wandb.init(
            project=self._tracking.wandb_project,
            id=self._id,
            name=self._name,
            config=self._experiment,
            dir=str(self._folder),
            mode=self._tracking.wandb,
            resume="allow" if self._resumed and online else None,
            # W&B's own capture of the terminal would break the progress bar; log.txt holds what was printed.
            # Without a limit, its end waits for a server that cannot be reached for as long as that takes.
            settings=wandb.Settings(
                console="off", quiet=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True
            ),
        )
        self._run.define_metric("macro_batch")
        self._run.define_metric("*", step_metric="macro_batch")
        self._run.define_metric("val_loss", step_metric="macro_batch", summary="min,last")
        self._told = self._run.summary.get("macro_batch", -1)

    def record(self, figures: Mapping[str, float | int | None]) -> None:
        """Logs the known figures of a macro-batch not yet logged; not NaN, which W&B would keep as the minimum."""
        macro_batch = figures["macro_batch"]
        if macro_batch is not None and macro_batch > self._told:
            known = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
            self._run.log(known)

    def sample(self, macro_batch: int, text: str) -> None:
        """Logs a text sampled from the model."""
        if macro_batch > self._told:
            page = require("wandb", "wandb").Html(f"<pre>{html.escape(text)}</pre>")
            self._run.log({"macro_batch": macro_batch, "sample": page})

    def close(self, status: str) -> None:
        """Ends this part of the W&B run, which counts as crashed if `status` is failed."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))

    def state_dict(self) -> dict[str, Any]:
        """The id of the W&B run."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the id of the W&B run to go on with; before `open`."""
        if "id" in state and self._run is None:
            self._id, self._resumed = state["id"], True
