"""Packing keeps every document whole that fits into a row, every token once, and no padding among the targets."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.packing import pack
from cleangpt.corpora.text import Text
from cleangpt.data.batch import IGNORED
from cleangpt.data.loader import Samples, validation_batches
from cleangpt.errors import UserError

lengths = st.lists(st.integers(0, 40), max_size=60)


def numbered(sizes: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different, from 1 on."""
    return np.split(np.arange(1, sum(sizes) + 1), np.cumsum(sizes)[:-1]) if sizes else []


@given(sizes=lengths, row_length=st.integers(2, 20))
def test_every_token_is_packed_once_and_documents_that_fit_stay_whole(sizes: list[int], row_length: int) -> None:
    documents = numbered(sizes)
    tokens, mask = pack(documents, row_length)
    assert sorted(tokens[tokens > 0].tolist()) == list(range(1, sum(sizes) + 1))
    rows = [row.tolist() for row in tokens]
    for document in map(np.ndarray.tolist, documents):
        if 0 < len(document) <= row_length:
            (row,) = [row for row in rows if document[0] in row]
            at = row.index(document[0])
            assert row[at : at + len(document)] == document
    assert (mask[:, 1:] == (tokens[:, 1:] > 0)).all() and not mask[:, :1].any()


@given(sizes=lengths, row_length=st.integers(2, 20), seed=st.integers(0, 9))
def test_a_token_keeps_its_own_mask(sizes: list[int], row_length: int, seed: int) -> None:
    wanted = np.random.default_rng(seed).integers(0, 2, sum(sizes) + 1)
    wanted[0] = 0
    documents = numbered(sizes)
    tokens, mask = pack(documents, row_length, [wanted[document] for document in documents])
    assert (mask[:, 1:] == wanted[tokens[:, 1:]]).all() and not mask[:, :1].any()


@given(sizes=lengths, row_length=st.integers(2, 20))
def test_few_rows_are_needed(sizes: list[int], row_length: int) -> None:
    """Against the bound on what any packing needs: the tokens, and the pieces longer than half a row."""
    tokens, _ = pack(numbered(sizes), row_length)
    pieces = [row_length] * sum(size // row_length for size in sizes) + [size % row_length for size in sizes]
    fewest = max(-(-sum(pieces) // row_length), sum(2 * piece > row_length for piece in pieces))
    assert len(tokens) <= 1.5 * fewest + 1


def test_a_packed_corpus_has_a_sample_per_row_and_no_padding_as_target(tmp_path: Path) -> None:
    texts = [f"{'ab' * (number % 9)}{number}" for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    corpus = Text(files=(str(tmp_path / "a.jsonl"),), pack=31, val_fraction=0.3)
    store = prepare_dataset(corpus, tmp_path / "data", console=Console(quiet=True))
    found: list[str] = []
    for name in ("train", "val"):
        samples = Samples(store.splits[name], 31)
        (batch,) = validation_batches(samples, samples.num_validation)
        for inputs, targets in zip(batch.inputs["tokens"].tolist(), batch.targets.tolist(), strict=True):
            tokens = inputs[:1] + [target for target in targets if target != IGNORED]
            assert tokens[-1] == store.tokenizer.eos_id
            ends = [at for at, token in enumerate(tokens) if token == store.tokenizer.eos_id]
            found += [store.tokenizer.decode(tokens[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]
    assert sorted(found) == sorted(texts)


def test_a_row_of_no_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"corpus.pack is 0; allowed: a whole number of 1 or more"):
        Text(files=("a",), pack=0).check()


def test_documents_of_no_tokens_take_no_room() -> None:
    rows, mask = pack([np.array([], np.int64), np.array([1, 2, 3]), np.array([], np.int64)], 5)
    assert rows.tolist() == [[1, 2, 3, 0, 0]] and mask.tolist() == [[0, 1, 1, 0, 0]]
    assert pack([np.array([], np.int64)], 5)[0].shape == (0, 5)
