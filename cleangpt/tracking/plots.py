"""Plots of one run, or of several in one picture, as PNG files.

Drawn through `Figure` objects, without pyplot: no window, no global state. Colours are those of Okabe and Ito (2008),
which colour-blind readers tell apart; from the eighth run on, line styles help.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from cleangpt.files import write_bytes
from cleangpt.tracking import metrics

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Rows]
"""Rows of metrics.jsonl, by the name that the run has in the legend."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
)
FEW = 40
"""With at most so many macro-batches each one gets a dot."""


def loss_plot(runs: Runs, path: Path) -> Path:
    """Training (thin) and validation loss (thick) over tokens seen; the best validation loss is marked."""
    return _draw(path, 1, lambda figure, axes: _draw_losses(figure, axes[0], runs))


def schedule_plot(runs: Runs, path: Path) -> Path | None:
    """Learning rate, weight decay and training batch size as they were, over samples seen."""
    return panels(runs, ["lr", "weight_decay", "training_batch_size"], "samples", "Schedules as run", path)


def throughput_plot(runs: Runs, path: Path) -> Path | None:
    """Tokens per second, model FLOPs utilisation where known, and the share of time spent waiting for data."""
    return panels(runs, ["tokens_per_second", "mfu", "data_wait_share"], "tokens", "Throughput", path)


def gradient_plot(runs: Runs, path: Path) -> Path | None:
    """Mean norm of the gradient over tokens seen."""
    return panels(runs, ["grad_norm"], "tokens", "Gradient norm", path)


def score_plot(runs: Runs, path: Path) -> Path | None:
    """Every score of a task over tokens seen."""
    names = dict.fromkeys(name for rows in runs.values() for row in rows for name in metrics.scores(row))
    return panels(runs, list(names), "tokens", "Scores", path)


def source_plot(runs: Runs, path: Path) -> Path | None:
    """The validation loss of each source of a mixture over tokens seen."""
    names = dict.fromkeys(name for rows in runs.values() for row in rows for name in row)
    losses = [name for name in names if name.startswith("val_loss/")]
    return panels(runs, losses, "tokens", "Validation loss by source", path)


def panels(runs: Runs, names: Sequence[str], x: str, title: str, path: Path) -> Path | None:
    """One panel for each of the figures `names` that any run knows, one below the other, over the figure `x`.

    Returns:
        `path`, or None where none of the figures is known; then nothing is drawn.
    """
    known = [name for name in names if any(best(rows, name) for rows in runs.values())]

    def draw(figure: Figure, axes: list[Axes]) -> None:
        for axis, name in zip(axes, known, strict=True):
            for index, (run, rows) in enumerate(runs.items()):
                _line(axis, rows, x, name, index, label=run)
            _dress(axis, name)
        axes[0].set_title(title)
        axes[-1].set_xlabel(_axis_label(x))
        if len(runs) > 1:
            _legend(figure, axes[0])

    return _draw(path, len(known), draw) if known else None


def schedule_preview(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> Path:
    """Planned schedules: for each figure (lr, weight_decay, training_batch_size) its samples and values."""
    rows = {name: [{"samples": x, name: y} for x, y in zip(*curve, strict=True)] for name, curve in curves.items()}

    def draw(figure: Figure, axes: list[Axes]) -> None:
        for axis, name in zip(axes, curves, strict=True):
            _line(axis, rows[name], "samples", name, 0, marker="")
            _dress(axis, name)
        axes[0].set_title("Planned schedules")
        axes[-1].set_xlabel(_axis_label("samples"))

    return _draw(path, len(curves), draw)


def column(rows: Rows, name: str) -> list[float]:
    """The figure `name` of every row; NaN, which leaves a gap in a line, where it is unknown or infinite."""
    values = [row.get(name) for row in rows]
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in values]


def best(rows: Rows, name: str = "val_loss") -> Mapping[str, Any] | None:
    """The row with the lowest `name`, the first one of equals; None where it is nowhere known."""
    values = column(rows, name)
    known = [index for index, value in enumerate(values) if math.isfinite(value)]
    return rows[min(known, key=values.__getitem__)] if known else None


def _draw_losses(figure: Figure, axis: Axes, runs: Runs) -> None:
    alone = len(runs) == 1
    for index, (run, rows) in enumerate(runs.items()):
        first, second = (0, 1) if alone else (index, index)
        thin: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.6, "marker": ""}
        _line(axis, rows, "tokens", "train_loss", first, label="training" if alone else None, **thin)
        lowest = best(rows)
        if lowest is None:
            continue
        words = f"best {lowest['val_loss']:.4f} at macro-batch {lowest.get('macro_batch')}"
        name = "validation" if alone else f"{run}: {words}"
        _line(axis, rows, "tokens", "val_loss", second, label=name, linewidth=2.0)
        star: Any = {"marker": "*", "markersize": 14, "markeredgecolor": "white", "linestyle": "", "zorder": 5}
        axis.plot(
            column([lowest], "tokens"),
            column([lowest], "val_loss"),
            color=_colour(second),
            label=words if alone else None,
            **star,
        )
    _dress(axis, "val_loss")
    axis.set_ylabel("loss (nats per token)")
    axis.set_xlabel(_axis_label("tokens"))
    axis.set_title("Loss" if alone else "Loss: validation (thick) and training (thin)")
    _legend(figure, axis)


def _line(axis: Axes, rows: Rows, x: str, y: str, index: int, **look: Any) -> None:
    marker = "." if len(rows) <= FEW else ""
    style = STYLES[index // len(COLOURS) % len(STYLES)]
    shape: Any = {"linewidth": 1.6, "marker": marker, "linestyle": style, "color": _colour(index)}
    if str(look.get("label")).startswith("_"):
        look["label"] = f" {look['label']}"  # Matplotlib leaves names that start with "_" out of the legend.
    if y == "training_batch_size":
        shape["drawstyle"] = "steps-pre"
    axis.plot(column(rows, x), column(rows, y), **(shape | look))


def _dress(axis: Axes, y: str) -> None:
    """Grid, units and tick labels of one panel."""
    axis.grid(True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#888888")
    axis.tick_params(color="#888888")
    axis.set_ylabel(_axis_label(y))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.margins(x=0.02, y=0.08)
    unit = metrics.figure(y).unit
    if unit == "share":
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    elif unit in ("samples", "tokens", "tokens/s", "steps"):
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axis.yaxis.set_major_formatter("{x:.4g}")
    if y.partition("/")[0] not in ("val_loss", "grad_norm") and axis.dataLim.ymin >= 0:
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax or 1)


def _axis_label(name: str) -> str:
    unit = metrics.figure(name).unit
    said = unit in metrics.label(name) or unit in ("share", "tokens/s", "score")
    return metrics.label(name) if said else f"{metrics.label(name)} ({unit})"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _legend(figure: Figure, axis: Axes) -> None:
    """The legend, below the data."""
    handles, names = axis.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    columns = max(1, min(len(names), 120 // (longest + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _draw(path: Path, count: int, draw: Callable[[Figure, list[Axes]], None]) -> Path:
    """Draws `count` panels and writes them to `path`, in one step."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed)]
    look: Any = {"font.family": fonts, "font.size": 10, "text.parse_math": False}
    picture = io.BytesIO()
    with matplotlib.rc_context(look), warnings.catch_warnings():
        # A letter that no font has is drawn as a box, which says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(8, 1.6 + 2.4 * count if count > 1 else 4.6), dpi=120, layout="constrained")
        draw(figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]))
        figure.savefig(picture, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getvalue())
    return path
