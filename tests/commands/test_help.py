"""--help says what can be typed: by section where there is much, with the meaning of each option beside it."""

import re
from pathlib import Path

import pytest

from cleangpt.commands import COMMANDS, main, train
from cleangpt.commands.fields import find_options
from cleangpt.commands.help import field_docs, find_sections
from cleangpt.experiment_files import experiments, load_experiment

SECTIONS = ("data", "model", "optimizer", "schedule", "training", "parallel", "saving", "tracking")


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "plan", "tune", "resume"])
def test_help_without_an_experiment_shows_options_and_sections_on_a_screen(
    command: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = help_of(capsys, command, "--help")
    assert len(printed.splitlines()) <= 70
    own = {"plan": "--devices", "tune": "--rates"}.get(command, "--time-limit")
    assert own in printed and "--run-dir FOLDER|none" in printed
    assert all(re.search(rf"^  {name} +\w", printed, re.MULTILINE) for name in SECTIONS)
    section = help_of(capsys, command, "--help", "optimizer")
    assert "--optimizer.lr NUMBER" in section and "--data" not in section


def test_help_of_an_experiment_is_short_and_its_sections_have_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    brief = help_of(capsys, "train", "adder", "--help")
    assert len(brief.splitlines()) <= 50 and "--optimizer.lr" not in brief
    whole = help_of(capsys, "train", "adder", "--help", "all")
    shown = set(re.findall(r"^  (--[\w.-]+)", whole, re.MULTILINE)) - {"--code"}
    options = list(find_options(train.Options, {"experiment": load_experiment(experiments()["adder"])}))
    assert shown == {option.name for option in options}
    for section in find_sections(options):
        assert help_of(capsys, "train", "adder", "--help", section).strip() in whole


def test_help_shows_the_values_of_the_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    lr = load_experiment(experiments()["adder"]).optimizer.lr
    assert f"[default: {lr}]" in help_of(capsys, "train", "adder", "--help", "optimizer.lr")


def test_help_on_what_does_not_exist_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "adder", "--help", "optimiser"]) == 2
    line = capsys.readouterr().err
    assert "--help optimiser: no section or option has this name" in line and "allowed: all, corpus, data" in line


@pytest.mark.parametrize("words", [["train", "adder"], ["prepare", "text"], ["sample"], ["report"], ["plan", "adder"]])
def test_every_metavar_says_what_the_value_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(capsys, *words, "--help", "all")
    assert not re.search(r"\bSTR\b|\bINT\b|\bFLOAT\b|[{}╭╰│─]|None\|", printed)
    assert not re.search(r"^usage:.* (STR|TEXT)\b", printed)


def test_a_flag_shows_both_names_beside_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    """The meaning is that of the first name; which of the two holds is said."""
    printed = " ".join(help_of(capsys, "train", "adder", "--help", "tracking").split())
    assert (
        "--tracking.progress, --tracking.no-progress Show a progress bar (plain lines without a terminal). "
        "[default: on]" in printed
    )
    assert "--tracking.tensorboard, --tracking.no-tensorboard Write TensorBoard" in printed
    assert "--cache, --no-cache Use a KV cache. [default: on]" in " ".join(help_of(capsys, "sample", "--help").split())


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train", "plan", "tune", "resume", "prepare"}))
def test_every_command_names_the_file_of_ones_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--code FILE" in help_of(capsys, command, "--help")


@pytest.mark.parametrize("name", ["adder", "tinystories_llama", "mixture_code_shakespeare"])
def test_every_option_is_explained(name: str) -> None:
    options = find_options(train.Options, {"experiment": load_experiment(experiments()[name])})
    plain = {"batch_size", "lr", "weight_decay", "muon", "lora"}  # sections of their own
    silent = [option.name for option in options if str(option.path[-1]) not in field_docs(option.owner)]
    assert not [option for option in silent if option.name.rpartition(".")[2].replace("-", "_") not in plain]


def test_a_class_without_source_has_no_docs() -> None:
    namespace: dict[str, object] = {}
    exec("from dataclasses import dataclass\n@dataclass\nclass Made:\n    x: int = 1\n    'What x is.'", namespace)
    made = namespace["Made"]
    assert isinstance(made, type) and field_docs(made) == {}
