"""Openings of fables, alone and in pairs: tokens, masks, labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.base import Corpus
from cleangpt.corpora.fable_openings import SENTENCES, VOCABULARY, FableOpenings, tokenizer
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.data.dataset import TokenDataset
from cleangpt.environments.fables import gold, grammatical, prompts
from cleangpt.errors import UserError

Row = tuple[str, str]
"""Prompt and answer."""


def prepared(corpus: Corpus, folder: Path) -> TokenDataset:
    return prepare_dataset(corpus, folder, console=Console(quiet=True))


def rows(dataset: TokenDataset, split: str) -> list[Row]:
    """As text, after checking that the mask covers the answer and the one end token."""
    length, part = dataset.row_length, dataset.splits[split]
    assert length is not None
    found = []
    for start in range(0, part.tokens, length):
        tokens, mask = part.read(start, length).astype(np.int64), part.read_mask(start, length).astype(bool)
        counted = tokens[mask]
        first, last = np.flatnonzero(mask)[[0, -1]]
        assert mask[first : last + 1].all() and last < length - 1
        assert counted[-1] == dataset.tokenizer.eos_id and (counted == dataset.tokenizer.eos_id).sum() == 1
        found.append(tuple(dataset.tokenizer.decode(ids.tolist()) for ids in (tokens[:first], counted)))
    return found


def column(dataset: TokenDataset, split: str, name: str) -> list[float]:
    """One value per row, after checking that all its tokens have it."""
    values = dataset.splits[split].read_column(name, 0, dataset.splits[split].tokens).reshape(-1, dataset.row_length)
    assert (values == values[:, :1]).all()
    return list(map(float, values[:, 0]))


def test_a_word_is_a_token() -> None:
    """So prompt and answer have the same tokens together as each alone."""
    assert tokenizer().vocab_size == VOCABULARY
    text = "Many years ago there lived a lonely squirrel called Wilma in a garden full of weeds."
    assert len(tokenizer().encode(text)) == len(text.split()) + 1
    prompt = text[: text.index(" lonely")]
    apart = np.concatenate([tokenizer().encode(prompt), tokenizer().encode(text[len(prompt) :])])
    assert tokenizer().encode(text).tolist() == apart.tolist()


def test_openings_are_different_sentences_of_the_grammar(tmp_path: Path) -> None:
    dataset = prepared(FableOpenings(train_sentences=1200, val_sentences=50), tmp_path)
    found = {split: rows(dataset, split) for split in ("train", "val")}
    assert [len(found["train"]), len(found["val"])] == [1200, 50]
    every = found["train"] + found["val"]
    assert len(set(every)) == 1250 and all(grammatical(prompt + answer) for prompt, answer in every)
    assert {prompt for prompt, _ in every} == set(prompts())
    assert dataset.splits["val"].text_bytes == sum(len(prompt + answer) for prompt, answer in found["val"])


def test_the_chosen_answer_has_the_higher_score(tmp_path: Path) -> None:
    corpus = FablePreferences(train_pairs=1100, val_pairs=40)
    dataset = prepared(corpus, tmp_path)
    assert dataset.group == ("chosen", "rejected")
    for split, pairs in (("train", 1100), ("val", 40)):
        found = rows(dataset, split)
        assert len(found) == 2 * pairs
        for (prompt, better), (same, worse) in zip(found[::2], found[1::2], strict=True):
            assert prompt == same and grammatical(prompt + better) and grammatical(same + worse)
            assert gold(better) > gold(worse)
        assert column(dataset, split, "margin") == [0.0] * len(found)
    assert len(set(zip(*[iter(rows(dataset, "train"))] * 2, strict=True))) == 1100


def test_a_share_of_the_training_labels_is_flipped(tmp_path: Path) -> None:
    right, flipped = (
        prepared(FablePreferences(train_pairs=1000, val_pairs=30, flip=flip), tmp_path) for flip in (0.0, 0.3)
    )
    assert rows(right, "val") == rows(flipped, "val")
    before, after = (rows(dataset, "train") for dataset in (right, flipped))
    swapped = [after[at : at + 2] == before[at : at + 2][::-1] for at in range(0, 2000, 2)]
    assert all(swap or after[2 * at : 2 * at + 2] == before[2 * at : 2 * at + 2] for at, swap in enumerate(swapped))
    assert 250 < sum(swapped) < 350
    assert f"flipped: {sum(swapped)}" in (flipped.folder / "card.md").read_text()


def test_more_training_pairs_come_after_the_same_ones(tmp_path: Path) -> None:
    few, many = (prepared(FablePreferences(train_pairs=pairs, val_pairs=30), tmp_path) for pairs in (20, 50))
    assert rows(few, "val") == rows(many, "val") and rows(few, "train") == rows(many, "train")[:40]


def test_labels_are_those_of_the_pairs_with_a_mismatched_answer_below_each(tmp_path: Path) -> None:
    pairs = rows(prepared(FablePreferences(train_pairs=30, val_pairs=20), tmp_path), "train")
    dataset = prepared(FablePreferences(train_pairs=30, val_pairs=20, form="labels"), tmp_path)
    assert dataset.group == ("answer", "mismatched")
    found = rows(dataset, "train")
    assert found[::2] == pairs
    assert column(dataset, "train", "desirable") == [1.0, 1.0, 0.0, 0.0] * 30
    answers = [answer for _, answer in pairs]
    for number, ((prompt, _), (below, answer)) in enumerate(zip(found[::2], found[1::2], strict=True)):
        assert below == prompt and answer == answers[(number + 2) % len(answers)]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (FableOpenings(train_sentences=0), "corpus.train_sentences is 0; allowed: 1 to 72,728"),
        (FableOpenings(train_sentences=SENTENCES), "allowed: 1 to 72,728, of 73,728 sentences"),
        (FableOpenings(row=19), "corpus.row is 19; allowed: 20 to 65,536"),
        (FablePreferences(val_pairs=0), "corpus.val_pairs is 0; allowed: 1 to 100,000,000"),
        (FablePreferences(seed=-1), "corpus.seed is -1"),
    ],
)
def test_a_field_out_of_range_is_refused(corpus: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        corpus.check()
