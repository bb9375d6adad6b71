"""Datasets of pictures of shapes: each row is a picture and what its scene says."""

from pathlib import Path

import numpy as np
import pytest

from cleangpt.corpora import prepare
from cleangpt.corpora.shapes import Shapes, ShapesCaptions, ShapesVQA, word_tokenizer
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import image_token
from cleangpt.data.pictures import resized
from cleangpt.data.records import records_of_row
from cleangpt.environments.base import Episode
from cleangpt.environments.shapes import QUESTIONS, caption, kind_of, picture
from cleangpt.errors import UserError

SIZES = {"train_samples": 30, "val_samples": 10, "test_samples": 5}


def prepared(corpus: Shapes) -> TokenDataset:
    return prepare(corpus, Path("data")).sources[0].dataset


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_row_is_a_picture_and_its_caption(split: str, workplace: Path) -> None:
    corpus = ShapesCaptions(**SIZES)
    dataset = prepared(corpus)
    part = dataset.splits[split]
    scenes = corpus.scenes(split, 0, SIZES[f"{split}_samples"])
    assert part.documents == len(scenes)
    for number, scene in enumerate(scenes):
        tokens, mask = part.read_row(number)
        assert tokens[:36] == [image_token(dataset.tokenizer)] * 36 and not any(mask[:36])
        counted = [token for token, counts in zip(tokens, mask, strict=True) if counts]
        assert counted[-1] == dataset.tokenizer.eos_id and dataset.tokenizer.decode(counted) == caption(scene)
        inputs = records_of_row(part.records, number * part.row_length, corpus.row_length)
        assert inputs["images_ends"].tolist() == [36] and (inputs["images"][0].numpy() == picture(scene)).all()


def test_without_pictures_the_text_stays(workplace: Path) -> None:
    """In rows of the same length, so that both are mixed."""
    corpus = ShapesCaptions(**SIZES, pictures=False)
    dataset = prepared(corpus)
    assert not dataset.splits["train"].records and corpus.environment(dataset) is None
    for number, scene in enumerate(corpus.scenes("train", 0, 30)):
        tokens, mask = dataset.splits["train"].read_row(number)
        counted = [token for token, counts in zip(tokens, mask, strict=True) if counts]
        assert dataset.tokenizer.decode(tokens[: len(counted)]) == caption(scene)
        assert len(tokens) == ShapesCaptions().row_length


def test_captions_of_bytes_fit_into_the_rows_of_other_corpora(workplace: Path) -> None:
    corpus = ShapesCaptions(**SIZES, tokenizer="byte", most_shapes=2, row=128, side=56, image_tokens=49)
    dataset = prepared(corpus)
    for split in ("train", "test"):
        part = dataset.splits[split]
        for number, scene in enumerate(corpus.scenes(split, 0, SIZES[f"{split}_samples"])):
            assert len(scene) <= 2
            tokens, mask = part.read_row(number)
            assert tokens[:49] == [0] * 49 and len(tokens) == 129
            counted = [token for token, counts in zip(tokens, mask, strict=True) if counts]
            assert counted == [*caption(scene).encode(), 256]
            shown = records_of_row(part.records, number * 129, 129)["images"][0].numpy()
            assert (shown == resized(picture(scene), 56, 56)).all()


@pytest.mark.parametrize("kind", [ShapesCaptions, ShapesVQA])
def test_the_longest_text_of_bytes_fits(kind: type[Shapes], workplace: Path) -> None:
    dataset = prepared(kind(train_samples=20, val_samples=20, test_samples=300, tokenizer="byte"))
    assert dataset.splits["test"].documents == 300


def test_a_row_that_is_too_short_is_named(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.row is 50; allowed: \d+ or more, into which a text fits"):
        prepared(ShapesCaptions(**SIZES, row=50))


def test_the_scenes_of_the_splits_differ() -> None:
    corpus = ShapesCaptions(val_samples=300)
    val, train = (set(corpus.scenes(split, 0, 300)) for split in ("val", "train"))
    assert not val & train


def test_every_word_is_one_token() -> None:
    known = word_tokenizer()
    texts = [caption(scene) for scene in ShapesCaptions().scenes("test", 0, 50)]
    assert max(len(known.encode(text)) - text.count(" ") - text.count(",") for text in texts) == 1
    assert known.vocab_size < 384


def test_a_question_stands_before_its_picture(workplace: Path) -> None:
    corpus = ShapesVQA(**SIZES)
    dataset = prepared(corpus)
    known, environment = dataset.tokenizer, corpus.environment(dataset)
    assert environment is not None
    part, scenes = dataset.splits["train"], corpus.scenes("train", 0, 30)
    for number, scene in enumerate(scenes):
        tokens, mask = part.read_row(number)
        start = mask.index(1)
        assert known.decode(tokens[: start - 36]).endswith("?")
        assert tokens[start - 36 : start] == [image_token(known)] * 36
        assert 2 <= sum(mask) <= 3  # a word, or a place of two, and the end of text
        inputs = records_of_row(part.records, number * part.row_length, corpus.row_length)
        assert inputs["images_ends"].tolist() == [start] and (inputs["images"][0].numpy() == picture(scene)).all()
    kinds = set()
    for number in range(10):
        prompt = environment.reset("val", number)
        question = known.decode(prompt.tokens[:-36])
        assert question.endswith("?") and question.count("?") == 1
        assert prompt.inputs["images"].shape == (1, 48, 48, 3)
        episode = Episode("val", number, prompt)
        episode.actions.append(prompt.extras["answer"])
        episode.feedback.append(environment.step(episode, prompt.extras["answer"]))
        assert episode.total_reward == 1 and environment.measures(episode) == {kind_of(question): 1.0}
        kinds.add(kind_of(question))
    assert kinds == QUESTIONS.keys()


def test_a_corpus_of_questions_continues_one_of_captions() -> None:
    assert ShapesVQA().scenes("train", 0, 5) == ShapesCaptions().scenes("train", 0, 5)


def test_fields_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="val_samples is 0"):
        ShapesVQA(val_samples=0)


def test_an_image_stands_at_as_many_tokens_as_it_is_told(workplace: Path) -> None:
    corpus = ShapesCaptions(**SIZES, image_tokens=9)
    part = prepared(corpus).splits["val"]
    assert records_of_row(part.records, 3 * part.row_length, corpus.row_length)["images_ends"].tolist() == [9]
    assert np.diff(part.read_row(3)[1]).argmax() == 8
