"""Plots of one run, or of several in one figure, as PNG files.

Drawn with `Figure` objects, without pyplot: no window, no global state. The colors are those of Okabe and Ito (2008),
which color-blind readers can tell apart; from the eighth run on, line styles differ too.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from cleangpt.files import write_bytes
from cleangpt.tracking import metrics

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Rows]
"""Rows of metrics.jsonl or of steps.jsonl, by the name of the run in the legend."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
"""Up to this many points, each has a marker."""
INTERVALS = 100
"""A noisy metric with more than twice as many points is drawn as its mean and spread in this many intervals."""
SPREAD = (0.1, 0.9)
"""Quantiles between which the spread is drawn."""
LOSSES = ("loss", "val_loss", "grad_norm")
"""Metrics whose axis does not start at zero, and is logarithmic if they fall or rise by more than `LOG_SPAN`."""
LOG_SPAN = 100
ROLLED_OUT = (
    "reward", "reward_std", "groups_without_signal", "kl", "entropy", "answer_length", "length_of_better",
    "length_of_worse", "truncated_share",
)  # fmt: skip
"""Metrics of rollouts that are drawn, where there are any."""
DISTANCE = "√KL from the initial model, √nats"
NOISY = ("loss", "grad_norm", "tokens_per_second")
"""Metrics that are drawn like that, besides an objective's metrics and task scores."""


def loss_plot(runs: Runs, steps: Runs, path: Path) -> Path:
    """Training loss by step and validation loss by macro-batch over tokens; the best validation loss is marked."""
    return _draw(path, 1, lambda figure, axes: _draw_losses(figure, axes[0], runs, steps))


def schedule_plot(runs: Runs, steps: Runs, path: Path) -> Path | None:
    """Learning rate and weight decay by step, and the mean batch size of every macro-batch, over samples."""
    curves = {"lr": steps, "weight_decay": steps, "training_batch_size": runs}
    return panels(curves, "samples", "Schedules", path)


def throughput_plot(runs: Runs, steps: Runs, path: Path) -> Path | None:
    """Tokens per second by step; model FLOPs utilization, where known, and time spent waiting for data."""
    curves = {"tokens_per_second": steps, "mfu": runs, "data_wait_share": runs}
    return panels(curves, "tokens", "Throughput", path)


def gradient_plot(steps: Runs, path: Path) -> Path | None:
    """Gradient norm by step, over tokens."""
    return panels({"grad_norm": steps}, "tokens", "Gradient norm", path)


def score_plot(runs: Runs, path: Path) -> Path | None:
    """Task scores over tokens."""
    names = [name for name in _names(runs) if metrics.scores([name])]
    return panels(dict.fromkeys(names, runs), "tokens", "Scores", path)


def objective_plot(runs: Runs, steps: Runs, path: Path) -> Path | None:
    """The objective's own metrics: training by step, validation by macro-batch."""
    curves = {name: steps for name in _names(steps) if name not in metrics.STEP_METRICS}
    curves |= {name: runs for name in _names(runs) if metrics.is_objective_metric(name) and name.startswith("val_")}
    return panels(curves, "tokens", "Metrics of the objective", path)


def rollout_plot(runs: Runs, path: Path) -> Path | None:
    """A policy's rewards, and what tells how it changes, over tokens."""
    names = [f"train_{name}" for name in ROLLED_OUT]
    return panels(dict.fromkeys(names, runs), "tokens", "Rollouts", path)


def reward_plot(runs: Runs, path: Path) -> Path | None:
    """Rewards and task scores over √KL from the initial model, as in Gao et al. 2022, "Scaling laws for reward model
    overoptimization": whether what is learned is worth what it costs. Of several rewards, each by its name."""
    measured = {
        run: [
            {**row, DISTANCE: math.sqrt(max(row["train_kl"], 0.0))} for row in rows if row.get("train_kl") is not None
        ]
        for run, rows in runs.items()
    }
    measured = {run: rows for run, rows in measured.items() if rows}
    named = [name for name in _names(runs) if name.startswith("train_reward/")]
    names = ["train_reward", *named[len(named) == 1 :], *(name for name in _names(runs) if metrics.scores([name]))]
    return panels(dict.fromkeys(names, measured), DISTANCE, "Reward against KL", path) if measured else None


def source_plot(runs: Runs, path: Path) -> Path | None:
    """The validation loss of each source of a mixture over tokens."""
    losses = [name for name in _names(runs) if name.startswith("val_loss/")]
    return panels(dict.fromkeys(losses, runs), "tokens", "Validation loss by source", path)


def best_of_n_plot(curves: Runs, path: Path) -> Path | None:
    """True score and judge's score of the best of n over √KL, one line for each judge."""
    return panels(dict.fromkeys(("true score", "judge's score"), curves), "√KL", "Best of n", path)


def panels(curves: Mapping[str, Runs], x: str, title: str, path: Path) -> Path | None:
    """Stacked panels over the metric `x`, one for each metric in `curves` that any of its runs has.

    Returns:
        `path`, or None if there is nothing to draw.
    """
    known = {name: runs for name, runs in curves.items() if any(best(rows, name) for rows in runs.values())}

    def draw(figure: Figure, axes: list[Axes]) -> None:
        for axis, (name, runs) in zip(axes, known.items(), strict=True):
            for index, (run, rows) in enumerate(runs.items()):
                _line(axis, rows, x, name, index, label=run)
            _format_axis(axis, name)
            if not metrics.metric(x).unit:  # no count, which may be in thousands
                axis.xaxis.set_major_formatter("{x:.4g}")
        axes[0].set_title(title)
        axes[-1].set_xlabel(_axis_label(x))
        if len(next(iter(known.values()))) > 1:
            _legend(figure, axes[0])

    return _draw(path, len(known), draw) if known else None


def histogram(edges: Sequence[float], counts: Sequence[int], name: str, title: str, path: Path) -> Path:
    """Counts of values of a metric between `edges`, one more than there are counts; those below 0 are set apart."""

    def draw(figure: Figure, axes: list[Axes]) -> None:
        colors = [_color(0) if left + right >= 0 else _color(1) for left, right in pairwise(edges)]
        axes[0].bar(edges[:-1], counts, np.diff(edges), align="edge", color=colors)
        _format_axis(axes[0], name)
        axes[0].set(title=title, xlabel=_axis_label(name), ylabel="count")
        axes[0].xaxis.set_major_formatter("{x:.4g}")
        axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))

    return _draw(path, 1, draw)


def schedule_preview(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> Path:
    """Planned schedules: for each metric (lr, weight_decay, training_batch_size) its samples and values."""
    rows = {name: [{"samples": x, name: y} for x, y in zip(*curve, strict=True)] for name, curve in curves.items()}

    def draw(figure: Figure, axes: list[Axes]) -> None:
        for axis, name in zip(axes, curves, strict=True):
            _line(axis, rows[name], "samples", name, 0, marker="")
            _format_axis(axis, name)
        axes[0].set_title("Planned schedules")
        axes[-1].set_xlabel(_axis_label("samples"))

    return _draw(path, len(curves), draw)


def column(rows: Rows, name: str) -> list[float]:
    """The metric `name` of every row, with NaN, which leaves a gap in a line, where it is missing or infinite."""
    values = [row.get(name) for row in rows]
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in values]


def best(rows: Rows, name: str = "val_loss") -> Mapping[str, Any] | None:
    """The first row with the lowest `name`; None if no row has it."""
    values = column(rows, name)
    known = [index for index, value in enumerate(values) if math.isfinite(value)]
    return rows[min(known, key=values.__getitem__)] if known else None


def _names(runs: Runs) -> list[str]:
    """The metrics of all runs, in order of first occurrence."""
    return list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row))


def _draw_losses(figure: Figure, axis: Axes, runs: Runs, steps: Runs) -> None:
    single = len(runs) == 1
    for index, (run, rows) in enumerate(runs.items()):
        first, second = (0, 1) if single else (index, index)
        thin: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.6, "marker": ""}
        _line(axis, steps[run], "tokens", "loss", first, label="training" if single else None, **thin)
        lowest = best(rows)
        if lowest is None:
            continue
        words = f"best {metrics.show('val_loss', lowest['val_loss'])} at macro-batch {lowest.get('macro_batch')}"
        name = "validation" if single else f"{run}: {words}"
        _line(axis, rows, "tokens", "val_loss", second, label=name, linewidth=2.0)
        star: Any = {"marker": "*", "markersize": 14, "markeredgecolor": "white", "linestyle": "", "zorder": 5}
        axis.plot(
            column([lowest], "tokens"),
            column([lowest], "val_loss"),
            color=_color(second),
            label=words if single else None,
            **star,
        )
    _format_axis(axis, "val_loss")
    axis.set_ylabel("loss (nats per token)")
    axis.set_xlabel(_axis_label("tokens"))
    axis.set_title("Loss" if single else "Loss: validation (thick) and training (thin)")
    _legend(figure, axis)


def _line(axis: Axes, rows: Rows, x: str, y: str, index: int, **options: Any) -> None:
    marker = "." if len(rows) <= FEW else ""
    style = STYLES[index // len(COLORS) % len(STYLES)]
    defaults: Any = {"linewidth": 1.6, "marker": marker, "linestyle": style, "color": _color(index)}
    if str(options.get("label")).startswith("_"):
        options["label"] = f" {options['label']}"  # Matplotlib leaves names that start with "_" out of the legend.
    if y == "training_batch_size":
        defaults["drawstyle"] = "steps-pre"
    xs, ys = column(rows, x), column(rows, y)
    noisy = y in NOISY or y not in metrics.METRICS | metrics.STEP_METRICS
    if noisy and len(rows) > 2 * INTERVALS:
        xs, ys, low, high = _intervals(xs, ys)
        axis.fill_between(xs, low, high, color=_color(index), alpha=0.2, linewidth=0)
    axis.plot(xs, ys, **(defaults | options))


def _intervals(xs: list[float], ys: list[float]) -> tuple[list[float], ...]:
    """Noisy values in `INTERVALS` runs of neighbors: mean x, mean y, and the quantiles `SPREAD` of y in each."""
    rows = []
    for part in np.array_split(np.array([xs, ys]), INTERVALS, axis=1):
        known = part[1][np.isfinite(part[1])]
        low, high = np.quantile(known, SPREAD) if len(known) else (math.nan, math.nan)
        rows.append((part[0].mean(), known.mean() if len(known) else math.nan, low, high))
    return tuple(list(column) for column in zip(*rows, strict=True))


def _format_axis(axis: Axes, y: str) -> None:
    """Sets grid, units and tick labels of one panel."""
    axis.grid(True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#888888")
    axis.tick_params(color="#888888")
    axis.set_ylabel(_axis_label(y))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.margins(x=0.02, y=0.08)
    if (y.partition("/")[0] in LOSSES or metrics.is_objective_metric(y)) and _span(axis) >= LOG_SPAN:
        axis.set_yscale("log")
    unit = metrics.metric(y).unit
    if unit == "share":
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    elif unit in ("samples", "tokens", "tokens/s", "steps"):
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axis.yaxis.set_major_formatter("{x:.4g}")
    if y.partition("/")[0] not in LOSSES and axis.get_yscale() == "linear" and axis.dataLim.ymin >= 0:
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax or 1)


def _span(axis: Axes) -> float:
    """The ratio of the largest to the smallest value that is drawn; 0 unless all are positive."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.zeros(1)])
    known = drawn[np.isfinite(drawn)]
    return float(known.max() / known.min()) if len(known) and known.min() > 0 else 0.0


def _axis_label(name: str) -> str:
    unit = metrics.metric(name).unit
    redundant = unit in metrics.label(name) or unit in ("share", "tokens/s")
    return metrics.label(name) if redundant else f"{metrics.label(name)} ({unit})"


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _legend(figure: Figure, axis: Axes) -> None:
    """Puts the legend below the axes."""
    handles, names = axis.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    columns = max(1, min(len(names), 120 // (longest + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _draw(path: Path, count: int, draw: Callable[[Figure, list[Axes]], None]) -> Path:
    """Draws `count` panels and writes them to `path` atomically."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed)]
    settings: Any = {"font.family": fonts, "font.size": 10, "text.parse_math": False}
    image = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A character that no font has is drawn as a box; no need for a warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(8, 1.6 + 2.4 * count if count > 1 else 4.6), dpi=120, layout="constrained")
        draw(figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]))
        figure.savefig(image, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, image.getvalue())
    return path
