"""resume RUN: continue a run from its newest snapshot"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cleangpt.checkpoints.run_folder import EXPERIMENT, EXPERIMENT_FILE, check_resumable, find_run, read_experiment
from cleangpt.commands.overrides import subject_or_help
from cleangpt.commands.train import Options, parse_launch
from cleangpt.experiment_files import run_file
from cleangpt.training.launch import train


def command(words: Sequence[str]) -> None:
    """Resumes a run; fields that its data and weights do not depend on can be overridden."""
    run = find_run(subject_or_help(Options, words, "resume", "RUN", runs))
    if (run / EXPERIMENT_FILE).is_file():
        run_file(run / EXPERIMENT_FILE)
    before = read_experiment(run)
    about = f"Fields of {run / EXPERIMENT}; those of data and model cannot be changed any more."
    experiment, deadline = parse_launch(before, words[1:], f"cleangpt resume {words[0]}", about)
    check_resumable(before, experiment)
    train(dataclasses.replace(experiment, run_dir=str(run)), deadline=deadline, resumed=run)


def runs() -> list[str]:
    """The names in runs/."""
    names = sorted(path.name for path in Path("runs").glob("*") if path.is_dir())
    return names or ["the folder of a run; runs/ has none yet"]
