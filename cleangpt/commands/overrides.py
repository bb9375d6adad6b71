"""Command lines over an experiment: every field is an option."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from cleangpt.commands import subject
from cleangpt.commands.options import FLAT, parse
from cleangpt.config import LENGTHS
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import experiments, find_experiment, load_experiment, recorded_overrides


def parse_experiment(words: Sequence[str], command: str, about: str, fields: Sequence[tuple[str, Any, Any]]) -> Any:
    """The options of a command over an experiment: its own `fields`, and `experiment` with its fields overridden."""
    path = find_experiment(subject(words, command, "EXPERIMENT", lambda: list(experiments())))
    overrides = [*recorded_overrides(path), *words[1:]]
    about = f"{about.format(path)}; options that name a field override it."
    return parse_over(load_experiment(path), fields, overrides, f"cleangpt {command} {words[0]}", about)


def parse_over(
    experiment: Experiment, fields: Sequence[tuple[str, Any, Any]], words: Sequence[str], program: str, about: str
) -> Any:
    """Options of a command's own `fields`, and of the `experiment`, whose fields are options without a prefix."""
    experiment = with_length_of(experiment, words)
    described = Annotated[type(experiment), FLAT]  # type: ignore[valid-type]
    options = dataclasses.make_dataclass("Options", [("experiment", described, experiment), *fields])
    return parse(options, words, program=program, about=about)


def with_length_of(experiment: Experiment, words: Sequence[str]) -> Experiment:
    """The experiment with its length in the unit of the last option that gives one, which then replaces its number."""
    units = [word.partition("=")[0].replace("-", "_").removeprefix("__training.") for word in words]
    given = [unit for unit in units if unit in LENGTHS]
    if not given or getattr(experiment.training, given[-1]) is not None:
        return experiment
    lengths: dict[str, Any] = dict.fromkeys(LENGTHS) | {given[-1]: 1}
    return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, **lengths))
