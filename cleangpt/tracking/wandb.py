"""Metrics and samples for Weights & Biases, online or offline; needs the package wandb.

The id of the W&B run is chosen here and kept in the snapshot, so that a resumed run continues the same W&B run. W&B
cannot delete points, and its own step, here the optimizer's, must not decrease: a point that it already has is not
logged again. After a rollback it therefore keeps the points of the abandoned steps.

Offline, every session of a run writes a folder RUN/wandb/offline-run-…, all with one id; ``wandb sync --append``
uploads them, oldest first, into one W&B run. If a session was killed, the steps since its last snapshot may be in two
of them, with the same values.
"""

import contextlib
import html
import math
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cleangpt.config import TrackingConfig
from cleangpt.errors import UserError, require
from cleangpt.tracking.metrics import Value, step_tag, tag

FINISH_SECONDS = 60
"""How long the end of a run waits for the upload; the rest stays in RUN/wandb, for ``wandb sync``."""


KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
HOST = "api.wandb.ai"


def check_login() -> None:
    """Looks for an API key where W&B does: in the environment, its settings, and .netrc.

    Raises:
        UserError: there is none. W&B itself would say so only once the run has started.
    """
    settings = require("wandb").setup().settings
    known = [os.environ.get(name) for name in KEYS] + [getattr(settings, "api_key", None)]
    hosts = {HOST, urlsplit(str(settings.base_url)).netloc}
    if not any(known) and not hosts & _hosts_with_password():
        raise UserError(
            "tracking.wandb is 'online', and Weights & Biases has no API key here; run wandb login, set WANDB_API_KEY, "
            "or set tracking.wandb to offline"
        )


def _hosts_with_password() -> set[str]:
    """The hosts in the user's .netrc."""
    paths = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    found: set[str] = set()
    for path in paths:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            found |= netrc.netrc(Path(path).expanduser()).hosts.keys()
    return found


class WandbTracker:
    """Logs every metric against the step, with the experiment as the run's config."""

    def __init__(self, config: TrackingConfig, name: str, experiment_json: dict[str, Any], run: Path) -> None:
        self._config, self._name = config, f"{name} {run.name}"
        self._experiment, self._folder = experiment_json, run
        self._id = uuid.uuid4().hex[:16]
        self._resumed = False
        self._run: Any = None
        self._step, self._logged_before = 0, -1
        """The step of the last metrics, and the last step that W&B already had when the run was resumed."""

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Starts or resumes the W&B run; after a rollback, waits for the first step that W&B does not have."""
        if self._run is not None:
            self._logged_before = max(self._logged_before, self._step)
            return
        wandb = require("wandb")
        online = self._config.wandb == "online"
        self._run = wandb.init(
            project=self._config.wandb_project,
            id=self._id,
            name=self._name,
            config=self._experiment,
            dir=str(self._folder),
            mode=self._config.wandb,
            resume="allow" if self._resumed and online else None,
            # W&B's own capture of the terminal would break the progress bar; log.txt has the output. Without a timeout,
            # finishing would wait forever for a server that cannot be reached.
            settings=wandb.Settings(
                console="off", quiet=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True
            ),
        )
        for axis in ("step", "tokens"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric(tag("val_loss"), step_metric="step", summary="min,last")
        self._logged_before = self._run.step - 1

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Logs the known metrics of a macro-batch."""
        self._step = int(metrics["step"] or 0)
        self._log({tag(name): value for name, value in metrics.items()})

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Logs the known metrics of some steps."""
        for row in rows:
            self._step = int(row["step"] or 0)
            self._log({step_tag(name): value for name, value in row.items()})

    def sample(self, macro_batch: int, text: str) -> None:
        """Logs a text sampled from the model."""
        if self._step > self._logged_before:
            page = require("wandb").Html(f"<pre>{html.escape(text)}</pre>")
            self._run.log({"sample": page}, step=self._step)

    def close(self, status: str) -> None:
        """Ends this session of the W&B run, which counts as crashed if `status` is failed."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))

    def state_dict(self) -> dict[str, Any]:
        """The id of the W&B run."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the id of the W&B run to continue; has no effect once that is open."""
        if "id" in state and self._run is None:
            self._id, self._resumed = state["id"], True

    def _log(self, values: Mapping[str, Value]) -> None:
        """Logs finite values, unless W&B has this step already; it would keep a NaN as the minimum."""
        if self._step > self._logged_before:
            known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
            self._run.log(known, step=self._step)
