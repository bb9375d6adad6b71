"""A mixture is described by its sources, survives JSON and the command line, and refuses what cannot be mixed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cleangpt.checkpoints.run_folder import kinds
from cleangpt.commands import train
from cleangpt.commands.overrides import parse_over
from cleangpt.config import Source
from cleangpt.corpora import prepare, prepare_dataset
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.mixture import Mixture, environments
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.text import Text
from cleangpt.errors import UserError
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.validation import from_json, to_json

QUIET = Console(quiet=True)
SMALL = {"train_samples": 60, "val_samples": 10, "test_samples": 10}
CURVE = ((0.0, 2.0), (1.0, 0.0))


def sources(**fields: Any) -> tuple[Source, ...]:
    """Two adders, with fields of the first source changed."""
    first = Source(name="easy", corpus=Adder(digits=1, train_samples=60, val_samples=10, test_samples=10))
    return dataclasses.replace(first, **fields), Source(name="hard", corpus=Adder(digits=2, **SMALL), weight=CURVE)


def test_a_mixture_survives_json() -> None:
    mixture = Mixture(sources=sources(max_epochs=3), temperature=2.0)
    there = json.loads(json.dumps(to_json(mixture, kinds())))
    assert from_json(Mixture, there, kinds()) == mixture


def test_a_damaged_source_is_told_with_its_place() -> None:
    there = to_json(Mixture(sources=sources()), kinds())
    there["sources"][1]["weigth"] = 1
    with pytest.raises(UserError, match=r"^sources.1.weigth is not a field of Source; did you mean 'weight'\?"):
        from_json(Mixture, there, kinds())


def test_the_command_line_changes_fields_of_a_source() -> None:
    experiment = load_experiment(experiments()["mixture_code_shakespeare"])
    words = ["--corpus.sources.0.weight", "3", "--corpus.sources.1.corpus.file", "a.txt", "--corpus.temperature", "5"]
    changed = parse_over(train.Options, experiment, words, "train", "").experiment
    assert isinstance(changed.corpus, Mixture)
    code, shakespeare = changed.corpus.sources
    assert (code.weight, changed.corpus.temperature) == (3.0, 5.0)
    assert shakespeare.corpus == ShakespeareChar(file="a.txt", tokenizer="byte")


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (lambda: Mixture(sources=()), "corpus.sources are none; allowed: one or more"),
        (
            lambda: Mixture(sources=sources(name="hard")),
            "corpus.sources are hard, hard; allowed: one or more",
        ),
        (lambda: Mixture(sources=sources(name="a/b")), "corpus.sources.0.name is 'a/b'; allowed: up to 40 letters"),
        (lambda: Mixture(sources=sources(weight=0.0)), "corpus.sources.0.weight is 0.0; allowed: a number above 0"),
        (lambda: Mixture(sources=sources(weight=((0.5, 1.0), (0.2, 1.0)))), "corpus.sources.0.weight is"),
        (lambda: Mixture(sources=sources(weight=((0.0, -1.0), (1.0, 1.0)))), "no weight below 0"),
        (lambda: Mixture(sources=sources(weight=float("inf"))), "corpus.sources.weight is inf"),
        (
            lambda: Mixture(sources=sources(max_epochs=0)),
            "corpus.sources.0.max_epochs is 0; allowed: a whole",
        ),
        (lambda: Mixture(sources=sources(corpus=Adder(digits=9))), "source easy: corpus.digits is 9"),
        (lambda: Mixture(sources=sources(corpus=Mixture(sources=sources()))), "corpus.sources.0.corpus is a Mixture"),
        (
            lambda: Mixture(sources=sources(weight="much")),
            "corpus.sources.weight is 'much'; allowed: a number or",
        ),
        (lambda: Mixture(sources=sources(), temperature=0.0), "corpus.temperature is 0.0; allowed: more than 0"),
    ],
)
def test_what_is_out_of_range_is_told_in_one_line(mixture: Callable[[], Mixture], message: str) -> None:
    with pytest.raises(UserError) as refused:
        mixture().check()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_source_has_the_dataset_that_its_corpus_has_on_its_own(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    mixed = prepare(Mixture(sources=sources()), tmp_path, console=quiet)
    alone = prepare_dataset(Adder(digits=2, **SMALL), tmp_path, console=quiet)
    _, hard = mixed.sources
    assert (hard.name, hard.dataset.folder) == ("hard", alone.folder)
    assert mixed.tokenizer.to_json() == alone.tokenizer.to_json()


@pytest.mark.parametrize(("temperature", "ratio"), [(None, 1.0), (1.0, 9.0), (2.0, 3.0)])
def test_a_temperature_weighs_by_size(tmp_path: Path, temperature: float | None, ratio: float) -> None:
    for name, size in (("small", 2000), ("large", 18_000)):
        (tmp_path / f"{name}.txt").write_text("x" * size, encoding="utf-8")
    texts = tuple(Source(name=name, corpus=Text(files=(str(tmp_path / f"{name}.txt"),))) for name in ("small", "large"))
    mixed = prepare(Mixture(sources=texts, temperature=temperature), tmp_path / "data", console=Console(quiet=True))
    small, large = (source.weight for source in mixed.sources)
    assert large / small == pytest.approx(ratio, rel=1e-3)


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    mixture = Mixture(sources=sources(corpus=Multiplier(digits=1, **{**SMALL, "train_samples": 60})))
    with pytest.raises(UserError, match="the sources easy and hard have different tokenizers"):
        prepare(mixture, tmp_path, console=Console(quiet=True))


def test_each_source_that_has_one_gives_its_environment(tmp_path: Path) -> None:
    write = tmp_path / "a.txt"
    write.write_text("a plain text\n" * 50, encoding="utf-8")
    text = Source(name="text", corpus=Text(files=(str(write),), tokenizer_file=None))
    mixture = Mixture(sources=sources())
    dataset = prepare(mixture, tmp_path / "data", console=QUIET)
    assert {name: found.metric for name, found in environments(mixture, dataset).items()} == {
        "easy": "exact_match",
        "hard": "exact_match",
    }
    alone = prepare(text.corpus, tmp_path / "data", console=QUIET)
    assert environments(text.corpus, alone) == {}
