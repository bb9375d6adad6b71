"""Openings of fables: what is wanted of them, and which belong to the grammar."""

from pathlib import Path

import pytest
from rich.console import Console

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.corpora.fables import Fables
from cleangpt.environments.base import Episode
from cleangpt.environments.fables import BRIGHT, WORDS, FablesGold, gold, grammatical, prompts

SENTENCE = "One cold winter there lived a brave kitten called Mia beside a quiet lake."


def test_every_bright_word_occurs_in_the_grammar() -> None:
    words = " ".join(phrase for kind in ("trait", "animal", "hero", "home") for phrase in WORDS[kind]).split()
    assert all(words.count(word) == 1 for word in BRIGHT) and len(BRIGHT) == 14


@pytest.mark.parametrize(
    ("text", "ended", "score"),
    [
        (SENTENCE, True, 5.0),
        (SENTENCE, False, 4.0),
        ("Long ago there lived a proud fox called Tom behind a red barn.", True, 0.0),
        ("Long ago there lived a brave brave brave fox", True, 0.0),
        ("Long ago there lived a brave kitten called brave Mia", False, 1.5),
        ("Long ago there lived a braver kittens' Miami.", True, 0.0),
        ("", False, -1.0),
    ],
)
def test_gold_counts_bright_words_once(text: str, ended: bool, score: float) -> None:
    assert gold(text, ended) == score


def test_the_first_sentence_of_every_story_is_grammatical() -> None:
    for position in range(200):
        assert grammatical(Fables().story(position).split(". ")[0] + ".")


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE[:-1], SENTENCE[:-1] + "!", SENTENCE + " ", SENTENCE + SENTENCE, "",
        SENTENCE.replace("brave", "curious brave"), SENTENCE.replace("Mia", "kitten"),
        SENTENCE.replace("One cold", "One dry"),
    ],
)  # fmt: skip
def test_anything_else_is_not(text: str) -> None:
    assert grammatical(SENTENCE) and not grammatical(text)


def test_a_task_is_a_prompt_to_be_continued_to_the_end(tmp_path: Path) -> None:
    dataset = prepare_dataset(
        FableOpenings(train_sentences=30, val_sentences=20), tmp_path, console=Console(quiet=True)
    )
    environment = FablesGold(dataset)
    tokenizer = dataset.tokenizer
    assert environment.tasks("train") == 30 and environment.tasks("val") == 20
    for task in range(20):
        prompt = environment.reset("val", task)
        assert tokenizer.decode(prompt.tokens) in prompts() and list(prompt.stop_ids) == [tokenizer.eos_id]
        answer = tokenizer.encode(" brave fox called Mia behind a red barn.").tolist()
        episode = Episode("val", task, prompt)
        assert environment.step(episode, [*answer, tokenizer.eos_id]).reward == 2.0
        assert environment.step(episode, answer).reward == 1.0
        episode.actions, episode.feedback = [[*answer, tokenizer.eos_id]], [environment.step(episode, answer)]
        assert environment.measures(episode) == {"grammatical": 1.0}
        episode.actions = [answer[1:]]
        assert environment.measures(episode) == {"grammatical": 0.0}
