"""Trackers that fail: training continues, one line says so, metrics.jsonl is complete."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cleangpt import tracking
from tests.faults import fault
from tests.faults._runs import TRAIN, check_whole, output, run, start, victim
from tests.faults._runs import finish as ended
from tests.faults.signals import send

CALLS = ("open", "log_steps", "record", "sample", "state_dict", "load_state_dict", "close")


class Faulty:
    """A tracker that fails whenever it is asked to do one thing."""

    def __init__(self, what: str) -> None:
        self.what = what

    def fail(self, what: str) -> None:
        if self.what == what:
            raise ConnectionError(f"cannot {what}")

    def open(self, truncate_after: int | None, last_step: int | None) -> None:
        self.fail("open")

    def log_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.fail("log_steps")

    def record(self, metrics: Mapping[str, Any]) -> None:
        self.fail("record")

    def sample(self, macro_batch: int, text: str) -> None:
        self.fail("sample")

    def close(self, status: str) -> None:
        self.fail("close")

    def state_dict(self) -> dict[str, Any]:
        self.fail("state_dict")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fail("load_state_dict")


def with_faulty(what: str) -> None:
    plain = tracking.Trackers.__init__

    def begin(self: tracking.Trackers, files: Any, others: Any, log: Any) -> None:
        plain(self, files, others | {"faulty": Faulty(what)}, log)

    tracking.Trackers.__init__ = begin  # type: ignore[method-assign]


@fault("a tracker that fails at every call of one kind", short=2, long=len(CALLS))
def faulty(seed: int, folder: Path) -> None:
    """In a run that is resumed, since only such a run loads a state."""
    what = CALLS[(4 + seed) % len(CALLS)]
    victim(folder)
    assert run(folder, *TRAIN, hook=functools.partial(send, ("SIGTERM",), "a step", 5)) == 0, output(folder)
    assert run(folder, *TRAIN, hook=functools.partial(with_faulty, what)) == 0, output(folder)
    line = f"faulty failed and is dropped, training continues without it: cannot {what}\n"
    assert output(folder).count(line) == 1, output(folder)
    check_whole(folder, checkpoints=False)


@fault("Weights & Biases cannot be reached", short=0, long=1)
def unreachable(seed: int, folder: Path) -> None:
    """Really tried, at a port where nobody listens."""
    settings = {"BASE_URL": "http://127.0.0.1:9", "API_KEY": "0" * 40, "INIT_TIMEOUT": "3", "SILENT": "true"}
    home = {"CONFIG_DIR": str(folder / "config"), "CACHE_DIR": str(folder / "cache")}
    environment = {f"WANDB_{name}": value for name, value in (settings | home).items()}
    victim(folder)
    process = start(folder, *TRAIN, "--tracking.wandb", "online", environment=os.environ | environment)
    assert ended(process, 120) == 0, output(folder)
    assert output(folder).count("wandb failed and is dropped, training continues without it: ") == 1, output(folder)
    check_whole(folder, checkpoints=False)
