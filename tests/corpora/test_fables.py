"""Stories of a grammar: no two alike, true to themselves, and the splits share none."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.fables import MORALS, Fables
from cleangpt.data.dataset import TokenDataset
from cleangpt.environments.fables import WORDS
from cleangpt.errors import UserError


@given(st.integers(0, 10**9), st.integers(0, 2**63 - 1))
def test_a_story_is_true_to_itself(position: int, seed: int) -> None:
    """What returns is what was said first, and the pronouns and the moral belong to who it is about."""
    story = Fables(seed=seed).story(position)
    first = re.match(r"(?:.*) there lived a (\w+) (\w+) called (\w+) (.*)\. \3 had seen a ([\w ]+?) (?:in|on) ", story)
    assert first is not None
    trait, animal, hero, _, wish = first.groups()
    assert story.count(f"a {wish}") == 3 and f"to the {wish}, which lay" in story
    assert story.endswith(f"The {trait} {animal} had learned that {MORALS[trait]}.\n")
    she = hero in ("Mia", "Lina", "Ada", "Nora", "Ruby", "Hazel", "Wilma", "Elsa")
    assert set(re.findall(r"\b(?:she|her|he|him)\b", story)) == ({"she", "her"} if she else {"he", "him"})
    gift = re.search(r'"Give me (.*), and I will', story)
    assert gift is not None and f" {gift.group(1)}. The " in story
    assert not re.search(r"\ba [aeiou]", story) and "{" not in story


def test_every_trait_has_its_moral() -> None:
    assert set(WORDS["trait"]) == set(MORALS)


@pytest.mark.slow
def test_the_splits_hold_as_many_stories_as_asked_for_and_no_story_twice(tmp_path: Path) -> None:
    store = prepare_dataset(Fables(train_stories=1500, val_stories=30), tmp_path, console=Console(quiet=True))
    assert isinstance(store, TokenDataset)
    assert {name: split.documents for name, split in store.splits.items()} == {"train": 1500, "val": 30}
    train, val = (store.splits[name] for name in ("train", "val"))
    corpus = Fables(train_stories=1500, val_stories=30)
    stories = [corpus.story(position) for position in range(1530)]
    assert len(set(stories)) == 1530
    for split, expected in ((val, stories[:30]), (train, stories[30:])):
        tokens = split.read(0, split.tokens).tolist()
        assert tokens.count(256) == len(expected)
        assert bytes(token for token in tokens if token < 256).decode() == "".join(expected)
        assert split.text_bytes == sum(map(len, expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_stories": 0}, "corpus.train_stories is 0; allowed: 1 to 100,000,000"),
        ({"seed": -1}, "corpus.seed is -1; allowed: a whole number of 0 or more"),
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Fables(**fields).check()
