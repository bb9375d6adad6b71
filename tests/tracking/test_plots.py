"""Plots: what is drawn is what was measured."""

import math

import matplotlib.figure
import pytest
from PIL import Image

from cleangpt.tracking import plots


def rows(count=5, base=2.0, **figures):
    return [
        {
            "macro_batch": index,
            "samples": 100 * index,
            "tokens": 6400 * index,
            "train_loss": base - 0.1 * index,
            "val_loss": base + 0.1 * (index - 3) ** 2,
            "lr": 1e-3 * index,
            "weight_decay": 0.1,
            "training_batch_size": 12 * index,
            "tokens_per_second": 1e4,
            "data_wait_share": 0.001,
            **figures,
        }
        for index in range(1, count + 1)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn during a test."""
    figures = []

    class Recorded(matplotlib.figure.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(plots, "Figure", Recorded)
    return figures


def lines(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_losses_stand_over_tokens_with_the_best_marked(tmp_path, drawn):
    path = plots.loss_plot({"one": rows()}, tmp_path / "plots" / "loss.png")
    (axis,) = drawn[0].axes
    tokens = [6400, 12800, 19200, 25600, 32000]
    training, validation, star = lines(axis)
    assert training == (tokens, pytest.approx([1.9, 1.8, 1.7, 1.6, 1.5]))
    assert validation == (tokens, pytest.approx([2.4, 2.1, 2.0, 2.1, 2.4]))
    assert star == ([19200], [2.0])
    assert legend(drawn[0]) == ["training", "validation", "best 2.0000 at macro-batch 3"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens seen", "loss (nats per token)")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size[0] == 960
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def test_several_runs_have_their_names_and_own_colours(tmp_path, drawn):
    runs = {f"run {index}": rows(base=index + 2) for index in range(9)}
    plots.loss_plot(runs, tmp_path / "loss.png")
    assert legend(drawn[0]) == [f"run {index}: best {index + 2:.4f} at macro-batch 3" for index in range(9)]
    thick = [line for line in drawn[0].axes[0].lines if line.get_linewidth() == 2.0]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in thick}) == 9


def test_nan_infinity_and_unknown_leave_a_gap(tmp_path, drawn):
    damaged = rows()
    damaged[1]["val_loss"], damaged[2]["val_loss"], damaged[3]["val_loss"] = math.nan, math.inf, None
    plots.loss_plot({"one": damaged}, tmp_path / "loss.png")
    values = lines(drawn[0].axes[0])[1][1]
    assert [math.isnan(value) for value in values] == [False, True, True, True, False]


def test_a_run_without_any_validation_loss_is_drawn(tmp_path, drawn):
    plots.loss_plot({"one": rows(val_loss=None)}, tmp_path / "loss.png")
    assert legend(drawn[0]) == ["training"]


def test_schedules_stand_over_samples_one_panel_each(tmp_path, drawn):
    plots.schedule_plot({"one": rows()}, tmp_path / "schedules.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == [
        "learning rate",
        "weight decay",
        "training batch size (samples)",
    ]
    assert lines(drawn[0].axes[0]) == [([100, 200, 300, 400, 500], pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]))]
    assert drawn[0].axes[-1].get_xlabel() == "samples seen"


def test_figures_that_no_run_knows_have_no_panel(tmp_path, drawn):
    plots.throughput_plot({"one": rows(mfu=None)}, tmp_path / "throughput.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["tokens per second", "data wait"]
    plots.throughput_plot({"one": rows(mfu=0.4), "two": rows()}, tmp_path / "throughput.png")
    assert [axis.get_ylabel() for axis in drawn[1].axes] == ["tokens per second", "MFU", "data wait"]
    assert plots.score_plot({"one": rows()}, tmp_path / "scores.png") is None
    assert not (tmp_path / "scores.png").exists()
    assert plots.score_plot({"one": rows(exact_match=0.5, own=3)}, tmp_path / "scores.png") == tmp_path / "scores.png"
    assert [axis.get_ylabel() for axis in drawn[2].axes] == ["exact match", "own"]


@pytest.mark.parametrize("figures", [{}, {"weight_decay": 0, "lr": 0.0, "train_loss": math.nan, "val_loss": 1e30}])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_any_length_and_value_is_drawn_without_a_warning(tmp_path, count, figures):
    for name in ("loss", "schedule", "throughput"):
        path = getattr(plots, f"{name}_plot")({"one": rows(count, **figures)}, tmp_path / f"{name}.png")
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_planned_schedules_are_drawn_as_given(tmp_path, drawn):
    curves = {"lr": ([0, 50, 100], [0.0, 1e-3, 1e-4]), "weight_decay": ([0, 100], [0.1, 0.1])}
    path = plots.schedule_preview(curves, tmp_path / "preview.png")
    assert path.stat().st_size > 1000
    assert [lines(axis) for axis in drawn[0].axes] == [[curves["lr"]], [curves["weight_decay"]]]


@pytest.mark.parametrize("name", ["_hidden", "a$\\frac$b", "字符模型", "\U0001f9e0", "x" * 100])
def test_any_name_may_stand_in_the_legend(tmp_path, drawn, name):
    plots.schedule_plot({name: rows(), "other": rows()}, tmp_path / "schedules.png")
    assert [text.strip() for text in legend(drawn[0])] == [name, "other"]


def test_the_best_is_the_first_lowest_that_is_known():
    values = [None, 2.0, math.nan, 1.0, 1.0, -math.inf]
    assert plots.best([{"val_loss": value, "at": index} for index, value in enumerate(values)])["at"] == 3
    assert plots.best([{"val_loss": math.nan}, {}]) is None
