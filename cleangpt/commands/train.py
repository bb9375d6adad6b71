"""train EXPERIMENT: train an experiment, given by name or as the path of your own Python file"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cleangpt.commands.fields import FLAT
from cleangpt.commands.overrides import named_experiment, parse_over
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import load_experiment, recorded_overrides
from cleangpt.output import say
from cleangpt.training.deadline import read_time_limit
from cleangpt.training.launch import train
from cleangpt.validation import Metavar


@dataclass
class Options:
    """Options of `cleangpt train` and `cleangpt resume`."""

    experiment: Annotated[Experiment, FLAT]
    time_limit: Annotated[str, Metavar("TIME")] | None = None
    """Save and exit within this time, in SLURM's notation (1:30:00); slurm: within the time limit of the job."""


def command(words: Sequence[str]) -> None:
    """Trains an experiment; given the file of an earlier run, with the overrides of that run."""
    path = named_experiment(Options, words, "train")
    recorded = recorded_overrides(path)
    if recorded:
        say(f"with the overrides of this run: {' '.join(recorded)}")
    overrides = [*recorded, *words[1:]]
    about = f"Fields of {path}, with their values there as defaults."
    experiment, deadline = parse_launch(load_experiment(path), overrides, f"cleangpt train {words[0]}", about)
    train(experiment, source=path, overrides=overrides, deadline=deadline)


def parse_launch(
    experiment: Experiment, words: Sequence[str], program: str, about: str
) -> tuple[Experiment, float | None]:
    """The experiment with its overrides, and the deadline of this launch, which is not part of the experiment."""
    began = time.time()
    chosen = parse_over(Options, experiment, words, program, about)
    return chosen.experiment, None if chosen.time_limit is None else read_time_limit(chosen.time_limit, began)
