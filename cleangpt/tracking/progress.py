"""Progress of a run: a bar on a terminal, otherwise one line per macro-batch; all lines go to log.txt."""

import errno
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from cleangpt.screen import Screen
from cleangpt.tracking.metrics import label, scores, show
from cleangpt.tracking.numbers import show_time

LOG = "log.txt"
LOSSES = {"train_loss": "loss {}", "val_loss": "val {}"}
SPEEDS = {"lr": "lr {}", "tokens_per_second": "{} tokens/s", "mfu": "MFU {}", "visited_share": "visited {}"}
"""Formats of metrics in the bar and in the lines; task scores come between the two."""


class ProgressBar:
    """Shows the progress of a run; `log` works at any time, the bar is shown from `start` to `close`.

    Args:
        run: folder whose log.txt gets every line, with the time; None: none until `write_to`.
        progress: whether to print anything.
        console: where to print; None: standard output.
    """

    def __init__(self, run: Path | None = None, progress: bool = True, console: Console | None = None) -> None:
        self._run = run
        self._console = (console or Screen()) if progress else None
        self._live: Live | None = None
        self._metrics: dict[str, Any] = {}
        self._unwritten: deque[str] = deque(maxlen=100)
        """Lines for a log.txt that there is not yet."""
        self._macro_batches, self._per_macro_batch, self._done = 0, 1, 0
        self._clock: tuple[int, float] | None = None

    def write_to(self, run: Path | None) -> None:
        """Writes every line to the log.txt of this folder, those shown so far included; None: there is no log."""
        self._run = run
        if run is not None:
            _append(run, "".join(self._unwritten))
        self._unwritten.clear()

    def start(self, total_macro_batches: int, batches_per_macro_batch: int, done_batches: int = 0) -> None:
        """Shows the bar of a run in which `done_batches` batches are done."""
        self._macro_batches, self._per_macro_batch = total_macro_batches, batches_per_macro_batch
        self._done = done_batches
        if self._console and self._console.is_interactive and self._console.file.isatty():
            self._live = Live(self._render(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            # Rich hides the cursor; a process that is killed could not show it again.
            self._console.show_cursor(True)

    def update(self, batches_done: int, metrics: Mapping[str, Any]) -> None:
        """Moves the bar to `batches_done` batches of the run and shows `metrics`; keys as in `METRICS`."""
        self._done = batches_done
        self._metrics.update(metrics)
        # The first batches are slow (compilation, caches): the remaining time is estimated from here on.
        self._clock = self._clock or (batches_done, time.monotonic())
        self._draw()

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Prints the metrics of a finished macro-batch in one line, on a terminal truncated to its width."""
        self._metrics.update(metrics)
        words = [f"macro-batch {metrics['macro_batch']}/{self._macro_batches or '?'}", *_words(metrics)]
        words += [show_time(metrics["time_trained"])] if metrics.get("time_trained") is not None else []
        self._write(" · ".join(words))
        self._print(_fit(words, self._console.width) if self._live and self._console else " · ".join(words))
        self._draw()

    def log(self, text: str) -> None:
        """Prints a line, above the bar if there is one, and appends it to log.txt."""
        self._write(text)
        self._print(text)

    def close(self) -> None:
        """Removes the bar."""
        live, self._live = self._live, None
        if live:
            with suppress(OSError):
                live.stop()

    def time_left(self) -> float | None:
        """Estimated seconds to the end of the run, at this session's speed including validation and saving."""
        if self._clock is None or self._done <= self._clock[0]:
            return None
        left = self._macro_batches * self._per_macro_batch - self._done
        return left * (time.monotonic() - self._clock[1]) / (self._done - self._clock[0])

    def _write(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
        if self._run is None:
            self._unwritten.append(line)
        else:
            _append(self._run, line)

    def _draw(self) -> None:
        if self._live:
            try:
                self._live.update(self._render(), refresh=True)
            except OSError as error:
                self._drop_screen(error)

    def _drop_screen(self, error: OSError) -> None:
        """Stops printing if the output fails, such as a closed terminal; a full disk may have room again later."""
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            self.close()
            self._console = None

    def _print(self, text: str) -> None:
        if self._console is None:
            return
        try:
            encoding = self._console.encoding
            text = text.encode(encoding, "replace").decode(encoding)
            self._console.print(Text(text), soft_wrap=True)
            self._console.file.flush()
        except OSError as error:
            self._drop_screen(error)

    def _render(self) -> Group:
        """Two lines: the bar, and the current metrics."""
        total = self._macro_batches * self._per_macro_batch
        current = min(self._done // self._per_macro_batch + 1, self._macro_batches)
        left = self.time_left()
        line = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            line.add_column(ratio=ratio, no_wrap=True)
        line.add_row(
            f"macro-batch {current}/{self._macro_batches}",
            Bar(total=total, completed=self._done),
            f"{100 * self._done / max(total, 1):.0f} %",
            f"ETA {show_time(left)}" if left is not None else "",
        )
        width = self._console.width if self._console else 80
        return Group(line, Text(_fit(_words(self._metrics), width), no_wrap=True, style="dim"))


def _words(metrics: Mapping[str, Any]) -> list[str]:
    """The known metrics as text, the most important first."""
    wording = LOSSES | {name: f"{label(name)} {{}}" for name in scores(metrics)} | SPEEDS
    known = {name: words for name, words in wording.items() if metrics.get(name) is not None}
    return [words.format(show(name, metrics[name])) for name, words in known.items()]


def _fit(words: list[str], width: int) -> str:
    """As many of the first words as fit into `width` columns."""
    while len(words) > 1 and len(" · ".join(words)) > width - 1:
        words = words[:-1]
    return " · ".join(words)


def _append(run: Path, line: str) -> None:
    # On a full disk the line is only printed: a log must not end the training.
    with suppress(OSError), (run / LOG).open("a", encoding="utf-8", errors="replace") as file:
        file.write(line)
