"""The bar on a terminal, the lines anywhere else, and log.txt."""

import errno
import io
import re
import sys

import pytest
from rich.console import Console

from cleangpt.tracking import progress
from cleangpt.tracking.progress import ProgressBar

FIGURES = {
    "macro_batch": 3,
    "train_loss": 1.5,
    "val_loss": 1.625,
    "exact_match": 0.25,
    "lr": 3e-4,
    "tokens_per_second": 123456.0,
    "mfu": None,
    "visited_share": 0.231,
    "time_trained": 75.0,
}
LINE = (
    "macro-batch 3/10 · loss 1.5000 · val 1.6250 · exact match 25.0 % · lr 0.0003 · 123k tokens/s · "
    "visited 23.1 % · 0:01:15"
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Gone(Terminal):
    tried = 0

    def write(self, text):
        self.tried += 1
        raise OSError(errno.EIO, "the terminal is closed")


def on_terminal(file, run=None, width=100):
    return ProgressBar(run, console=Console(file=file, force_terminal=True, width=width, _environ={"TERM": "xterm"}))


def bare(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def log(run):
    return [line.split("  ", 1)[1] for line in (run / "log.txt").read_text(encoding="utf-8").splitlines()]


def test_without_a_terminal_there_is_one_line_for_each_macro_batch(tmp_path, capsys):
    bar = ProgressBar(tmp_path)
    bar.log("hello [bold] :smile:")
    bar.start(10, 5)
    bar.update(3, {"train_loss": 2.0})
    bar.record(FIGURES)
    bar.close()
    assert capsys.readouterr().out == f"hello [bold] :smile:\n{LINE}\n"
    assert log(tmp_path) == ["hello [bold] :smile:", LINE]


def test_silent_on_the_screen_still_fills_the_log(tmp_path, capsys):
    bar = ProgressBar(tmp_path, progress=False)
    bar.start(10, 5)
    bar.update(3, {"train_loss": 2.0})
    bar.record(FIGURES)
    bar.log("bye")
    bar.close()
    assert capsys.readouterr() == ("", "")
    assert log(tmp_path) == [LINE, "bye"]


def test_the_log_is_appended_to_by_a_resumed_run(tmp_path):
    for text in ("one", "two 你好"):
        ProgressBar(tmp_path, progress=False).log(text)
    assert log(tmp_path) == ["one", "two 你好"]


def test_the_bar_shows_position_figures_and_share(tmp_path):
    screen = Terminal()
    bar = on_terminal(screen, tmp_path)
    bar.start(10, 5, 10)
    bar.update(13, {"train_loss": 2.0, "lr": 1e-3, "tokens_per_second": 5000, "mfu": 0.41, "visited_share": 0.5})
    shown = bare(screen.getvalue())
    assert "macro-batch 3/10" in shown
    assert "26 %" in shown
    assert "loss 2.0000 · lr 0.001 · 5,000 tokens/s · MFU 41.0 % · visited 50.0 %" in shown
    bar.record(FIGURES)
    bar.update(15, {"train_loss": 1.4})
    assert "loss 1.4000 · val 1.6250 · exact match 25.0 %" in bare(screen.getvalue())
    bar.close()
    assert log(tmp_path) == [LINE]


@pytest.mark.parametrize("width", [20, 40, 80, 110])
def test_no_line_is_wider_than_the_terminal(width):
    screen = Terminal()
    bar = on_terminal(screen, width=width)
    bar.start(10, 5)
    bar.record(FIGURES)
    bar.update(13, FIGURES)
    bar.close()
    lines = re.split(r"[\r\n]", bare(screen.getvalue()))
    assert max(map(len, lines)) <= width
    assert any(line.startswith("macro-batch 3/10") for line in lines)


def test_the_cursor_is_visible_while_the_bar_stands():
    screen = Terminal()
    bar = on_terminal(screen)
    bar.start(10, 5)
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")
    bar.close()


def test_the_time_left_is_the_work_left_at_the_speed_of_this_session(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = ProgressBar(progress=False)
    bar.start(10, 5, 20)
    assert bar.time_left() is None
    now = 150.0
    bar.update(22, {})
    assert bar.time_left() is None
    now = 156.0
    bar.update(26, {})
    assert bar.time_left() == pytest.approx((50 - 26) * 6 / 4)


@pytest.mark.parametrize("first", ["update", "record", "log", "close"])
def test_a_terminal_that_is_gone_does_not_end_the_training(tmp_path, first):
    stdout = sys.stdout
    bar = on_terminal(Terminal(), tmp_path)
    bar.start(10, 5)
    assert sys.stdout is not stdout
    gone = bar._console.file = Gone()
    actions = {
        "update": lambda: bar.update(2, {"train_loss": 2.0}),
        "record": lambda: bar.record(FIGURES),
        "log": lambda: bar.log("still here"),
        "close": bar.close,
    }
    actions[first]()
    assert sys.stdout is stdout
    actions["log"]()
    tried = gone.tried
    for action in actions.values():
        action()
    assert gone.tried == tried > 0
    assert set(log(tmp_path)) == {LINE, "still here"}


def test_letters_that_the_screen_cannot_show_become_question_marks():
    raw = io.BytesIO()
    screen = io.TextIOWrapper(raw, encoding="cp1252", newline="\n")
    bar = ProgressBar(console=Console(file=screen))
    bar.log("你好 é")
    assert raw.getvalue().decode("cp1252") == "?? é\n"


class Full(io.StringIO):
    """A file on a disk that may be full."""

    full = True

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_full_disk_under_the_output_and_the_log_does_not_end_the_training(tmp_path):
    file = Full()
    (tmp_path / "log.txt").mkdir()  # cannot be written either
    bar = ProgressBar(tmp_path, console=Console(file=file))
    bar.log("unheard")
    file.full = False
    bar.log("there is room again")
    assert "there is room again" in file.getvalue()
