"""Metrics and samples for Weights & Biases, online or offline; needs the package wandb.

The id of the W&B run is chosen here and kept in RUN/wandb.json and in the snapshot, so that a resumed run continues
the same W&B run. W&B cannot delete points, and its own step, here the optimizer's, must not decrease: a point that it
already has is not logged again. After a rollback it therefore keeps the points of the abandoned steps.

Offline, every session of a run writes a folder RUN/wandb/offline-run-…, all with one id; ``wandb sync --append``
uploads them, oldest first, into one W&B run, in which every macro-batch stands once. W&B writes 32 KiB at a time, so
the folder of a session that was killed lacks its end: it is removed when the run is resumed, and the next session first
logs again what the run's own files have of it. Online, it logs again what has not reached the server.
"""

import contextlib
import html
import math
import netrc
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import urlsplit

from cleangpt.config import TrackingConfig
from cleangpt.errors import UserError, parsing, require
from cleangpt.files import read_json, safe_name, user_path, write_json
from cleangpt.tracking.metrics import Value, read_metrics, read_samples, read_steps, step_tag, tag

SESSIONS = "wandb.json"
"""The W&B run's id, and its sessions: of each the folder, and the last step and macro-batch logged if it has ended."""
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
            found |= netrc.netrc(user_path(path)).hosts.keys()
    return found


class WandbTracker:
    """Logs every metric against the step, with the experiment as the run's config."""

    def __init__(self, config: TrackingConfig, name: str, experiment_json: dict[str, Any], run: Path) -> None:
        self._config, self._name = config, f"{name} {run.name}"
        self._experiment, self._folder = experiment_json, run
        known = _read_sessions(run)
        self._resumed = "id" in known
        self._id: str = known.get("id") or uuid.uuid4().hex[:16]
        self._sessions: list[dict[str, Any]] = known.get("sessions", [])
        self._run: Any = None
        self._step = self._macro_batch = 0
        """Of the last metrics."""
        self._logged = {"step": -1, "macro_batch": -1}
        """The last ones that earlier sessions have logged, which are not logged again."""
        self._on_server = -1
        """The last step that the server had when the run was resumed."""
        self._shown = False
        """Whether the last macro-batch was logged."""

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        """Starts or resumes the W&B run; after a rollback, waits for the first step that W&B does not have.

        Raises:
            UserError: W&B refuses a setting, or has no API key.
        """
        if self._run is not None:
            self._logged = self._last_logged()
            return
        self._run = run = self._start()
        self._drop_killed_sessions()
        for session in self._sessions:
            self._logged = {name: max(value, session[name]) for name, value in self._logged.items()}
        if run.step > self._logged["step"] + 1:  # a killed session has sent more
            self._on_server = self._logged["step"] = run.step - 1
        self._sessions.append({"folder": Path(run.dir).parent.name, "step": None, "macro_batch": None})
        self._write_sessions()
        if last_step is not None:
            self._log_again(last_step)

    def _start(self) -> Any:
        """Opens the W&B run."""
        wandb = require("wandb")
        try:
            run = wandb.init(
                project=self._config.wandb_project,
                id=self._id,
                name=self._name,
                config=self._experiment,
                dir=str(self._folder),
                mode=self._config.wandb,
                resume="allow" if self._resumed and self._config.wandb == "online" else None,
                # W&B's own capture of the terminal would break the progress bar; log.txt has the output. Without a
                # timeout, finishing would wait forever for a server that cannot be reached.
                settings=wandb.Settings(
                    console="off", quiet=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True
                ),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(f"tracking.wandb is {self._config.wandb!r}, and W&B refuses: {error}") from None
        for axis in ("step", "tokens"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        run.define_metric(tag("val_loss"), step_metric="step", summary="min,last")
        return run

    def _drop_killed_sessions(self) -> None:
        """Forgets sessions that were killed, and removes the folders of those that were offline."""
        for session in [session for session in self._sessions if session["step"] is None]:
            if session["folder"].startswith("offline-"):
                shutil.rmtree(self._folder / "wandb" / session["folder"], ignore_errors=True)
            self._sessions.remove(session)

    def _last_logged(self) -> dict[str, int]:
        return {name: max(value, getattr(self, f"_{name}")) for name, value in self._logged.items()}

    def _write_sessions(self) -> None:
        write_json(self._folder / SESSIONS, {"id": self._id, "sessions": self._sessions})

    def _log_again(self, last_step: int) -> None:
        """Logs what the run's files have up to a step and W&B does not have."""
        rows = {row["macro_batch"]: row for row in read_metrics(self._folder)}
        entries = [(row["step"], 0, partial(self.log_steps, [row])) for row in read_steps(self._folder)]
        entries += [(row["step"], 1, partial(self.record, row)) for row in rows.values()]
        entries += [
            (rows[entry["macro_batch"]]["step"], 2, partial(self.sample, entry["macro_batch"], entry["text"]))
            for entry in read_samples(self._folder)
            if entry["macro_batch"] in rows
        ]
        for step, _, log in sorted(entries, key=itemgetter(0, 1)):
            if step <= last_step:
                log()

    def record(self, metrics: Mapping[str, Value]) -> None:
        """Logs the known metrics of a macro-batch."""
        self._step, self._macro_batch = int(metrics["step"] or 0), int(metrics["macro_batch"] or 0)
        self._shown = self._macro_batch > self._logged["macro_batch"] and self._step > self._on_server
        if self._shown:
            self._log({tag(name): value for name, value in metrics.items()})

    def log_steps(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Logs the known metrics of some steps."""
        for row in rows:
            self._step = int(row["step"] or 0)
            if self._step > self._logged["step"]:
                self._log({step_tag(name): value for name, value in row.items()})

    def sample(self, macro_batch: int, text: str) -> None:
        """Logs a text sampled from the model."""
        if self._shown:
            page = require("wandb").Html(f"<pre>{html.escape(text)}</pre>")
            self._run.log({"sample": page}, step=max(self._step, self._run.step))

    def close(self, status: str) -> None:
        """Ends this session of the W&B run, which counts as crashed if `status` is failed."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))
        self._sessions[-1].update(self._last_logged())
        self._write_sessions()

    def state_dict(self) -> dict[str, Any]:
        """The id of the W&B run."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the id of the W&B run to continue; has no effect once that is open."""
        if "id" in state and self._run is None:
            self._id, self._resumed = state["id"], True

    def _log(self, values: Mapping[str, Value]) -> None:
        """Logs finite values, since W&B would keep a NaN as the minimum; its own step must not decrease."""
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._run.log(known, step=max(self._step, self._run.step))


def _read_sessions(run: Path) -> dict[str, Any]:
    """The content of wandb.json; nothing if there is none, or if it is not what this module writes."""
    path = run / SESSIONS
    try:
        with parsing(path):
            known = read_json(path)
            for session in known["sessions"]:
                safe_name(session["folder"], path)
                if {type(session["step"]), type(session["macro_batch"])} not in ({int}, {NoneType}):
                    raise ValueError
            return {"id": str(known["id"]), "sessions": known["sessions"]}
    except UserError:
        return {}
