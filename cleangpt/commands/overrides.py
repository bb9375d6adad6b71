"""Command lines from an experiment: every field is an option."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cleangpt.commands import subject
from cleangpt.commands.fields import find_options
from cleangpt.commands.help import help_text
from cleangpt.commands.options import asks_for_help, help_topic, parse
from cleangpt.config import LENGTHS
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import experiments, find_experiment, load_experiment, recorded_overrides

T = TypeVar("T")


def parse_experiment(kind: type[T], words: Sequence[str], command: str, about: str) -> T:
    """Parses a command line that starts with an experiment into the dataclass `kind`, which has a field for it."""
    path = named_experiment(kind, words, command)
    overrides = [*recorded_overrides(path), *words[1:]]
    about = f"{about.format(path)}; options that name a field override it."
    return parse_over(kind, load_experiment(path), overrides, f"cleangpt {command} {words[0]}", about)


def named_experiment(kind: type, words: Sequence[str], command: str) -> Path:
    """The file of the experiment that a command line starts with.

    Raises:
        UserError: there is none.
        SystemExit: with code 0, after the help of a command line that starts with --help.
    """
    return find_experiment(subject_or_help(kind, words, command, "EXPERIMENT", lambda: list(experiments())))


def subject_or_help(
    kind: type, words: Sequence[str], command: str, what: str, names: Callable[[], Sequence[str]]
) -> str:
    """The first argument of a command whose other options depend on it; for --help, those that do not."""
    if not asks_for_help(words[:1]):
        return subject(words, command, what, names)
    options = [
        dataclasses.replace(option, default=()) if option.default is dataclasses.MISSING else option
        for option in find_options(kind, {})
    ]
    about = f"{what} is one of: {', '.join(names())}; or a path. With it, --help shows its values, and the fields of "
    about += "its corpus and model."
    print(help_text(options, f"cleangpt {command} {what}", about, help_topic(words)))
    raise SystemExit(0)


def parse_over(kind: type[T], experiment: Experiment, words: Sequence[str], program: str, about: str) -> T:
    """Parses a command line into the dataclass `kind`; the fields of its `experiment` are options without a prefix."""
    experiment, words = with_last_length(experiment, words)
    return parse(kind, words, program=program, about=about, given={"experiment": experiment})


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
