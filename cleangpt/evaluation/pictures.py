"""Pictures of an agent: videos of its episodes, a contact sheet of them, and the tasks above each share of the expert.

Videos are MP4 where imageio is installed and can write it, by imageio-ffmpeg or av; else GIFs by Pillow, which
matplotlib brings.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cleangpt.environments.base import Environment
from cleangpt.errors import UserError, require
from cleangpt.evaluation.control import simulations
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.simulating import play_control

Frames = Sequence[NDArray[np.uint8]]
"""Pictures `(height, width, 3)`, all of one size."""
MOST_FRAMES, WIDTH, SECOND = 250, 320, 30
"""Of a GIF the most frames, to which a longer episode is thinned out; of any video pixels across, frames a second."""
BLOCK = 16
"""An MP4's height in pixels is a multiple of this, as is its width, which codecs ask for."""
SHOWN = 8
"""Frames of an episode on the contact sheet."""


def film(
    model: LanguageModel, environments: Mapping[str, Environment], split: str, count: int, device: torch.device,
    folder: Path,
) -> Path:  # fmt: skip
    """Plays episodes of each simulation; writes SOURCE_NUMBER.mp4 or .gif, and contact_sheet.png with a row for each.

    Args:
        model: in evaluation mode, on `device`.
        environments: by source.
        split: of the environments.
        count: episodes of each.
        device: of the model.
        folder: of the pictures.

    Returns:
        The contact sheet.

    Raises:
        UserError: there is no simulation.
    """
    simulated = simulations(environments)
    if not simulated:
        raise UserError("--videos films simulations; this run's corpus has none")
    folder.mkdir(parents=True, exist_ok=True)
    strips = []
    for source, environment in simulated.items():
        tasks = range(min(count, environment.tasks(split)))
        for number, episode in enumerate(play_control(model, environment, split, tasks, device, pictures=True)):
            name = (source or environment.name).replace("/", "_")
            write_video(folder / f"{name}_{number}", episode.frames)
            strips.append(strip(episode.frames))
    width = max(one.shape[1] for one in strips)
    padded = [np.pad(one, ((0, 4), (0, width - one.shape[1]), (0, 0)), constant_values=255) for one in strips]
    path = folder / "contact_sheet.png"
    Image.fromarray(np.concatenate(padded)).save(path)
    return path


def write_video(path: Path, frames: Frames) -> Path:
    """Writes all frames to `path`.mp4, or where that cannot be written, some to `path`.gif; returns which."""
    if find_spec("imageio") and (find_spec("imageio_ffmpeg") or find_spec("av")):
        return write_mp4(path.with_name(path.name + ".mp4"), frames)
    return write_gif(path.with_name(path.name + ".gif"), frames)


def write_mp4(path: Path, frames: Frames) -> Path:
    """Writes a video in H.264 of all frames, at `SECOND` a second."""
    images = np.stack([np.asarray(_resized(frame, WIDTH, BLOCK)) for frame in frames])
    require("imageio.v3").imwrite(path, images, fps=SECOND, codec="libx264")
    return path


def write_gif(path: Path, frames: Frames) -> Path:
    """Writes a video, of at most `MOST_FRAMES` frames, that repeats for ever."""
    every = -(-len(frames) // MOST_FRAMES)
    images = [_resized(frame, WIDTH) for frame in [*frames[::every]]]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 * every // SECOND, loop=0)
    return path


def strip(frames: Frames) -> NDArray[np.uint8]:
    """A row of frames from an episode's first to its last, `(height, width, 3)`."""
    chosen = np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)
    return np.concatenate([np.asarray(_resized(frames[number], WIDTH // 2)) for number in chosen], axis=1)


def draw_scores(metrics: Mapping[str, Any], sources: Sequence[str], path: Path) -> None:
    """Draws how many simulations score at least each share of their expert (Reed et al. 2022, figure 5); with several
    sources only."""
    scores = sorted(float(metrics[f"score/{source}"]) for source in sources if f"score/{source}" in metrics)
    if len(scores) < 2:
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = np.linspace(0, 120, 241)
    axes.step(shares, [sum(score >= share for score in scores) for share in shares], where="post")
    axes.set(xlabel="score (0: random, 100: expert)", ylabel="tasks with at least that", ylim=(0, len(scores) * 1.05))
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _resized(frame: NDArray[np.uint8], width: int, block: int = 1) -> Image.Image:
    """A frame of this width, and of a height that is a multiple of `block`."""
    image = Image.fromarray(frame)
    height = max(1, round(image.height * width / image.width / block)) * block
    return image.resize((width, height), Image.Resampling.BILINEAR)
