"""Scores of agents, their confidence intervals, and pictures of episodes."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cleangpt.evaluation import pictures
from cleangpt.evaluation.control import control_metrics, half_width
from cleangpt.evaluation.pictures import draw_scores, strip, write_gif, write_mp4, write_video
from cleangpt.rollouts.simulating import Played


def episodes(*scores: float) -> list[Played]:
    return [Played(number, score * 5, 10 + number, score > 50, score) for number, score in enumerate(scores)]


def test_metrics_are_means_by_source_and_over_sources() -> None:
    metrics = control_metrics({"a": episodes(0, 100, 80), "b": episodes(20, 40)})
    assert metrics["score/a"] == 60 and metrics["score/b"] == 30 and metrics["score"] == 45
    assert metrics["return/a"] == 300 and metrics["success/a"] == pytest.approx(2 / 3)
    assert metrics["episode_length/b"] == 10.5
    widths = [1.96 * np.std(scores, ddof=1) / math.sqrt(len(scores)) for scores in ([0, 100, 80], [20, 40])]
    assert [metrics["score_ci95/a"], metrics["score_ci95/b"]] == pytest.approx(widths)
    assert metrics["score_ci95"] == pytest.approx(math.sqrt(widths[0] ** 2 + widths[1] ** 2) / 2)


def test_a_single_source_has_no_mean_over_sources() -> None:
    assert set(control_metrics({"": episodes(1, 2)})) == {"score", "score_ci95", "return", "success", "episode_length"}


def test_a_mixture_of_one_task_has_a_mean_too() -> None:
    metrics = control_metrics({"a": episodes(100, 20)})
    assert metrics["score"] == metrics["score/a"] == 60 and metrics["score_ci95"] == metrics["score_ci95/a"]


def test_the_interval_holds_the_mean_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(1).normal(3, 2, (4000, 50))
    inside = [abs(row.mean() - 3) <= half_width(row.tolist()) for row in draws]
    assert np.mean(inside) == pytest.approx(0.945, abs=0.015)
    assert math.isnan(half_width([1.0]))


def test_a_video_has_the_frames_of_its_episode(tmp_path: Path) -> None:
    frames = [np.full((40, 60, 3), 25 * number, np.uint8) for number in range(10)]
    write_gif(tmp_path / "short.gif", frames)
    with Image.open(tmp_path / "short.gif") as video:
        assert video.size == (320, 213) and video.n_frames == 10  # type: ignore[attr-defined]
        for number in range(10):
            video.seek(number)
            assert abs(int(np.asarray(video.convert("RGB"))[100, 100, 0]) - 25 * number) <= 8
    write_gif(tmp_path / "long.gif", frames * 60)
    with Image.open(tmp_path / "long.gif") as video:
        assert video.n_frames <= 250  # type: ignore[attr-defined]
    row = strip(frames)
    assert row.shape == (107, 8 * 160, 3) and row[50, 5, 0] == 0 and row[50, -5, 0] == 225


@pytest.mark.parametrize(
    ("installed", "suffix"),
    [((), ".gif"), (("imageio",), ".gif"), (("imageio", "av"), ".mp4"), (("imageio", "imageio_ffmpeg"), ".mp4")],
)
def test_a_video_is_an_mp4_where_one_can_be_written(
    installed: tuple[str, ...], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(pictures, "write_mp4", lambda path, frames: path)
    written = write_video(tmp_path / "reach-v3.1_0", [np.zeros((4, 6, 3), np.uint8)] * 2)
    assert written == tmp_path / f"reach-v3.1_0{suffix}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio leaves pipes open
@pytest.mark.skipif(not (find_spec("av") or find_spec("imageio_ffmpeg")), reason="nothing writes MP4 here")
def test_an_mp4_has_all_frames_of_a_long_episode(tmp_path: Path) -> None:
    reader = pytest.importorskip("imageio.v3")
    frames = [np.full((40, 60, 3), 40 + number // 2, np.uint8) for number in range(300)]
    video = reader.imread(write_mp4(tmp_path / "long.mp4", frames))
    assert video.shape == (300, 208, 320, 3)
    assert np.abs(video[:, 100, 100, 0].astype(int) - (40 + np.arange(300) // 2)).max() <= 8


def test_shares_of_the_expert_are_drawn_for_several_tasks(tmp_path: Path) -> None:
    draw_scores({"score": 5.0, "score/a": 5.0}, ["a"], tmp_path / "one.png")
    draw_scores({"score/a": 5.0, "score/b": 90.0, "exact_match/c": 1.0}, ["a", "b", "c"], tmp_path / "two.png")
    assert not (tmp_path / "one.png").exists() and (tmp_path / "two.png").stat().st_size > 1000
