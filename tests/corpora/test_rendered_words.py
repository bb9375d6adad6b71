"""Datasets of pictures of invented words: a word is in one split alone, and its picture shows it whole."""

from pathlib import Path

import numpy as np
import pytest

from cleangpt.corpora import prepare
from cleangpt.corpora.rendered_words import (
    FONTS,
    HEIGHT,
    LONGEST,
    SHORTEST,
    TOKENIZER,
    WIDTH,
    RenderedWords,
    font,
    invent,
    picture,
    split_of,
)
from cleangpt.data.images import image_token
from cleangpt.data.records import records_of_row
from cleangpt.environments.base import Episode

CORPUS = RenderedWords(train_samples=20, val_samples=5, test_samples=3)


def test_a_row_is_a_picture_and_its_word_which_the_environment_asks_for(workplace: Path) -> None:
    dataset = prepare(CORPUS, Path("data")).sources[0].dataset
    environment = CORPUS.environment(dataset)
    for split, count in (("train", 20), ("val", 5), ("test", 3)):
        part, words = dataset.splits[split], CORPUS.words(split, 0, count)
        assert part.documents == environment.tasks(split) == count
        for number, word in enumerate(words):
            tokens, mask = part.read_row(number)
            assert tokens[:20] == [image_token(TOKENIZER)] * 20 and not any(mask[:20])
            shown = records_of_row(part.records, number * len(tokens), len(tokens))["images"]
            assert TOKENIZER.decode([token for token, one in zip(tokens, mask, strict=True) if one]) == f"{word}\n"
            prompt = environment.reset(split, number)
            assert prompt.inputs["images"].equal(shown) and prompt.extras["text"] == f"{word}\n"


@pytest.mark.parametrize(("said", "letters"), [("abcd\n", 1), ("abed\n", 0.75), ("bcd\na", 0), ("ab", 0.5)])
def test_a_reading_is_measured_by_the_letters_in_their_places(said: str, letters: float, workplace: Path) -> None:
    environment = CORPUS.environment(prepare(CORPUS, Path("data")).sources[0].dataset)
    prompt = environment.reset("val", 0)
    prompt.extras["answer"] = TOKENIZER.encode("abcd\n").tolist()
    episode = Episode("val", 0, prompt, actions=[TOKENIZER.encode(said).tolist()])
    assert environment.measures(episode) == {"letters": letters}
    assert environment.step(episode, episode.actions[0]).reward == (said == "abcd\n")


def test_no_word_is_in_two_splits_and_words_have_every_letter_and_length() -> None:
    words = {split: set(RenderedWords().words(split, 0, 120)) for split in ("train", "val", "test")}
    assert not words["train"] & words["val"] and not (words["train"] | words["val"]) & words["test"]
    assert all(split_of(word) == split for split, found in words.items() for word in found)
    assert {len(word) for word in words["train"]} == set(range(SHORTEST, LONGEST + 1))
    assert len(set("".join(words["train"]))) == 26
    assert 0.07 < np.mean([split_of(invent(seed)) == "test" for seed in range(1000)]) < 0.13


@pytest.mark.parametrize("word", ["mwmwmwmw", "gfy", "lllll"])
def test_a_picture_shows_the_whole_word_on_plain_paper(word: str) -> None:
    """The same ink as on a sheet with room to spare; pictures of the same word differ."""
    from PIL import Image, ImageDraw

    sizes = set()
    for seed in range(8):
        shown = picture(word, seed)[..., 0]
        assert shown.shape == (HEIGHT, WIDTH) and shown.dtype == np.uint8
        paper, ink = int(shown.max()), int(shown.min())
        drawn = np.count_nonzero(shown != paper)
        possible = []
        for name in FONTS:
            for size in range(6, 14):
                sheet = Image.new("L", (300, 60), paper)
                ImageDraw.Draw(sheet).text((50, 20), word, ink, font(name, size))
                possible.append(np.count_nonzero(np.asarray(sheet) != paper))
        assert drawn in possible and paper - ink >= 50
        sizes.add(shown.tobytes())
    assert len(sizes) == 8


def test_every_font_comes_with_matplotlib() -> None:
    assert {font(name, 11).getname()[0] for name in FONTS} == {"DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif"}
