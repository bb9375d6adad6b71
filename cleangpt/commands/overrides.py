"""Command lines from an experiment: every field is an option."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from cleangpt.commands import subject
from cleangpt.commands.options import FLAT, parse
from cleangpt.config import LENGTHS
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import experiments, find_experiment, load_experiment, recorded_overrides


def parse_experiment(words: Sequence[str], command: str, about: str, fields: Sequence[tuple[str, Any, Any]]) -> Any:
    """Parses a command's own `fields`, and overrides of the experiment's fields, into one options object."""
    path = find_experiment(subject(words, command, "EXPERIMENT", lambda: list(experiments())))
    overrides = [*recorded_overrides(path), *words[1:]]
    about = f"{about.format(path)}; options that name a field override it."
    return parse_over(load_experiment(path), fields, overrides, f"cleangpt {command} {words[0]}", about)


def parse_over(
    experiment: Experiment, fields: Sequence[tuple[str, Any, Any]], words: Sequence[str], program: str, about: str
) -> Any:
    """Parses a command's own `fields`, and those of `experiment`, which are options without a prefix."""
    experiment, words = with_last_length(experiment, words)
    described = Annotated[type(experiment), FLAT]  # type: ignore[valid-type]
    options = dataclasses.make_dataclass("Options", [("experiment", described, experiment), *fields])
    return parse(options, words, program=program, about=about)


def with_last_length(experiment: Experiment, words: Sequence[str]) -> tuple[Experiment, list[str]]:
    """Keeps only the last length option given: those in other units, and the experiment's own, are dropped."""
    units = [word.partition("=")[0].replace("-", "_").removeprefix("__training.") for word in words]
    given = [unit for unit in units if unit in LENGTHS]
    if not given:
        return experiment, list(words)
    kept: list[str] = []
    rest = iter(zip(words, units, strict=True))
    for word, unit in rest:
        if unit in LENGTHS and unit != given[-1]:
            if "=" not in word:
                next(rest, None)
        else:
            kept.append(word)
    if getattr(experiment.training, given[-1]) is None:
        lengths: dict[str, Any] = dict.fromkeys(LENGTHS) | {given[-1]: 1}  # the option replaces the 1
        experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, **lengths))
    return experiment, kept
