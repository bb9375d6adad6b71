"""Plots: what is drawn is what was logged."""

import math

import matplotlib.figure
import pytest
from PIL import Image

from cleangpt.tracking import plots


def rows(count=5, base=2.0, **metrics):
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
            **metrics,
        }
        for index in range(1, count + 1)
    ]


def steps(count=5, **metrics):
    return [
        {
            "step": step,
            "samples": 10 * step,
            "tokens": 640 * step,
            "loss": 3 - 0.1 * step,
            "lr": 1e-3 * step,
            "weight_decay": 0.1,
            "grad_norm": 1.0,
            "tokens_per_second": 1e4,
            "batch_size": 12 * step,
            "skipped": 0,
            **metrics,
        }
        for step in range(1, count + 1)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures drawn during a test."""
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
    path = plots.loss_plot({"one": rows()}, {"one": steps()}, tmp_path / "plots" / "loss.png")
    (axis,) = drawn[0].axes
    tokens = [6400, 12800, 19200, 25600, 32000]
    training, validation, star = lines(axis)
    assert training == ([640, 1280, 1920, 2560, 3200], pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5]))
    assert validation == (tokens, pytest.approx([2.4, 2.1, 2.0, 2.1, 2.4]))
    assert star == ([19200], [2.0])
    assert legend(drawn[0]) == ["training", "validation", "best 2.0000 at macro-batch 3"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens seen", "loss (nats per token)")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size[0] == 960
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def test_several_runs_have_their_names_and_own_colours(tmp_path, drawn):
    runs = {f"run {index}": rows(base=index + 2) for index in range(9)}
    plots.loss_plot(runs, {name: steps() for name in runs}, tmp_path / "loss.png")
    assert legend(drawn[0]) == [f"run {index}: best {index + 2:.4f} at macro-batch 3" for index in range(9)]
    thick = [line for line in drawn[0].axes[0].lines if line.get_linewidth() == 2.0]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in thick}) == 9


def test_nan_infinity_and_unknown_leave_a_gap(tmp_path, drawn):
    damaged = rows()
    damaged[1]["val_loss"], damaged[2]["val_loss"], damaged[3]["val_loss"] = math.nan, math.inf, None
    plots.loss_plot({"one": damaged}, {"one": steps()}, tmp_path / "loss.png")
    values = lines(drawn[0].axes[0])[1][1]
    assert [math.isnan(value) for value in values] == [False, True, True, True, False]


def test_a_run_without_any_validation_loss_is_drawn(tmp_path, drawn):
    plots.loss_plot({"one": rows(val_loss=None)}, {"one": steps()}, tmp_path / "loss.png")
    assert legend(drawn[0]) == ["training"]


def test_schedules_stand_over_samples_one_panel_each(tmp_path, drawn):
    plots.schedule_plot({"one": rows()}, {"one": steps()}, tmp_path / "schedules.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == [
        "learning rate",
        "weight decay",
        "training batch size (samples)",
    ]
    assert lines(drawn[0].axes[0]) == [([10, 20, 30, 40, 50], pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]))]
    assert drawn[0].axes[-1].get_xlabel() == "samples seen"


def test_metrics_that_no_run_has_have_no_panel(tmp_path, drawn):
    plots.throughput_plot({"one": rows(mfu=None)}, {"one": steps()}, tmp_path / "throughput.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["tokens per second", "data wait"]
    plots.throughput_plot(
        {"one": rows(mfu=0.4), "two": rows()}, {"one": [], "two": steps()}, tmp_path / "throughput.png"
    )
    assert [axis.get_ylabel() for axis in drawn[1].axes] == ["tokens per second", "MFU", "data wait"]
    assert plots.score_plot({"one": rows()}, tmp_path / "scores.png") is None
    assert not (tmp_path / "scores.png").exists()
    assert plots.score_plot({"one": rows(exact_match=0.5, own=3)}, tmp_path / "scores.png") == tmp_path / "scores.png"
    assert [axis.get_ylabel() for axis in drawn[2].axes] == ["exact match", "own"]


@pytest.mark.default(1)
@pytest.mark.parametrize("metrics", [{}, {"weight_decay": 0, "lr": 0.0, "loss": math.nan, "val_loss": 1e30}])
@pytest.mark.parametrize("count", [2, 1, 500])
def test_any_length_and_value_is_drawn_without_a_warning(tmp_path, count, metrics):
    one, by_step = {"one": rows(count, **metrics)}, {"one": steps(count, **metrics)}
    drawn = [
        plots.loss_plot(one, by_step, tmp_path / "loss.png"),
        plots.schedule_plot(one, by_step, tmp_path / "schedules.png"),
        plots.throughput_plot(one, by_step, tmp_path / "throughput.png"),
        plots.gradient_plot(by_step, tmp_path / "gradient.png"),
    ]
    for path in drawn:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_a_long_noisy_curve_is_drawn_as_mean_and_spread(tmp_path, drawn):
    noise = [(-1) ** index * (index % 10) for index in range(1000)]
    curve = [{"tokens": index, "grad_norm": 20 + value, "lr": value} for index, value in enumerate(noise)]
    curve[3]["grad_norm"] = math.nan
    plots.gradient_plot({"one": curve}, tmp_path / "gradient.png")
    (axis,) = drawn[0].axes
    ((xs, ys),) = lines(axis)
    assert len(xs) == 100
    assert (xs[1], ys[1]) == (pytest.approx(14.5), pytest.approx(20 + sum(noise[10:20]) / 10))
    (band,) = axis.collections
    low, high = (sorted(20 + value for value in noise[10:20])[index] for index in (0, -1))
    inside = [y for x, y in band.get_paths()[0].vertices if x == pytest.approx(14.5)]
    assert low <= min(inside) < ys[1] < max(inside) <= high
    plots.schedule_plot({}, {"one": [{**row, "samples": row["tokens"]} for row in curve]}, tmp_path / "schedules.png")
    assert [len(xs) for xs, _ in lines(drawn[1].axes[0])] == [1000]


def test_metrics_of_the_objective_have_a_panel_each(tmp_path, drawn):
    assert plots.objective_plot({"one": rows()}, {"one": steps()}, tmp_path / "objective.png") is None
    by_macro_batch = {"one": rows(val_accuracy=0.5, train_accuracy=0.25, exact_match=1.0)}
    plots.objective_plot(by_macro_batch, {"one": steps(accuracy=0.75)}, tmp_path / "objective.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["accuracy", "validation accuracy"]
    assert [axis.lines[0].get_ydata()[0] for axis in drawn[0].axes] == [0.75, 0.5]


@pytest.mark.slow
def test_rewards_stand_over_the_root_of_the_divergence_each_by_its_name_where_there_are_several(tmp_path, drawn):
    one = rows(2, train_kl=4.0, train_reward=1.0, exact_match=0.5, **{"train_reward/task": 1.0})
    both = [{**row, "train_reward/model": 2.0} for row in one]
    assert plots.reward_plot({"plain": rows()}, tmp_path / "reward.png") is None
    plots.reward_plot({"one": one}, tmp_path / "reward.png")
    plots.reward_plot({"both": both}, tmp_path / "reward.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["training reward", "exact match"]
    assert [axis.get_ylabel() for axis in drawn[1].axes] == [
        "training reward", "training reward, task", "training reward, model", "exact match",
    ]  # fmt: skip
    assert all(axis.lines[0].get_xdata()[0] == 2.0 for axis in drawn[1].axes)


def test_planned_schedules_are_drawn_as_given(tmp_path, drawn):
    curves = {"lr": ([0, 50, 100], [0.0, 1e-3, 1e-4]), "weight_decay": ([0, 100], [0.1, 0.1])}
    path = plots.schedule_preview(curves, tmp_path / "preview.png")
    assert path.stat().st_size > 1000
    assert [lines(axis) for axis in drawn[0].axes] == [[curves["lr"]], [curves["weight_decay"]]]


@pytest.mark.default(2)
@pytest.mark.parametrize("name", ["_hidden", "a$\\frac$b", "字符模型", "\U0001f9e0", "x" * 100])
def test_any_name_may_stand_in_the_legend(tmp_path, drawn, name):
    plots.schedule_plot({}, {name: steps(), "other": steps()}, tmp_path / "schedules.png")
    assert [text.strip() for text in legend(drawn[0])] == [name, "other"]


@pytest.mark.default(2)
@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([3.0, 2.0, 0.5], "linear"),
        ([3.0, 0.5, 0.0001], "log"),
        ([3.0, 0.5, 0.0], "linear"),
        ([3.0, math.nan], "linear"),
    ],
)
def test_losses_have_a_logarithmic_axis_where_they_fall_a_hundredfold(tmp_path, drawn, values, scale):
    by_step = [{"tokens": index, "samples": index, "loss": value, "grad_norm": value, "lr": value / 100, "z": value}
               for index, value in enumerate(values)]  # fmt: skip
    plots.loss_plot({"one": [{"tokens": 1, "val_loss": values[0]}]}, {"one": by_step}, tmp_path / "loss.png")
    plots.gradient_plot({"one": by_step}, tmp_path / "gradient.png")
    plots.schedule_plot({}, {"one": by_step}, tmp_path / "schedules.png")
    scales = [figure.axes[0].get_yscale() for figure in drawn]
    assert scales == [scale, scale, "linear"], "a schedule ramps up from near zero by design"


def test_the_best_is_the_first_lowest_that_is_known():
    values = [None, 2.0, math.nan, 1.0, 1.0, -math.inf]
    assert plots.best([{"val_loss": value, "at": index} for index, value in enumerate(values)])["at"] == 3
    assert plots.best([{"val_loss": math.nan}, {}]) is None
