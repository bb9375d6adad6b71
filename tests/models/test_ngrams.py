"""Each token gets the rows of the n-grams that it ends, and of no other token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.models.layers import document_ids
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.models.ngrams import ngram_rows, tokens_before

rows_of_tokens = st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=3)


def ngrams_by_hand(row: list[int], length: int, separator: int | None) -> list[tuple[int, ...]]:
    """What ends at each token, within its document, with -1 where the document has not begun."""
    found = []
    for end in range(len(row)):
        ngram: list[int] = []
        for place in range(end, end - length, -1):
            over = place < 0 or -1 in ngram or (separator is not None and place < end and row[place] == separator)
            ngram.append(-1 if over else row[place])
        found.append(tuple(ngram))
    return found


@given(rows=rows_of_tokens, count=st.integers(1, 5), separator=st.none() | st.integers(0, 4))
def test_the_tokens_before_are_those_of_the_row_and_document(
    rows: list[list[int]], count: int, separator: int | None
) -> None:
    tokens = torch.tensor(rows)
    documents = None if separator is None else document_ids(tokens, separator)
    before = tokens_before(tokens, count, documents)
    assert [[tuple(ngram) for ngram in row] for row in before.permute(1, 2, 0).tolist()] == [
        ngrams_by_hand(row, count, separator) for row in rows
    ]


@given(rows=rows_of_tokens, length=st.integers(2, 4))
def test_with_enough_rows_each_ngram_has_its_own(rows: list[list[int]], length: int) -> None:
    tokens = torch.tensor(rows)
    (found,) = ngram_rows(tokens_before(tokens, length), [length], (5 + 2) ** length, vocab_size=5)
    ngrams = [ngram for row in rows for ngram in ngrams_by_hand(row, length, None)]
    assert len(set(ngrams)) == len(set(found.flatten().tolist()))
    assert len(set(zip(ngrams, found.flatten().tolist(), strict=True))) == len(set(ngrams))


def test_a_hash_spreads_ngrams_of_a_large_vocabulary_evenly() -> None:
    """100,000 random 4-grams in 1,000 rows: a row has 100 on the average, with a standard deviation near 10."""
    before = torch.randint(50_257, (4, 1, 100_000), generator=torch.Generator().manual_seed(0))
    found = ngram_rows(before, [2, 3, 4], 1000, vocab_size=50_257)
    for rows in found:
        counts = rows.flatten().bincount(minlength=1000).float()
        assert len(counts) == 1000 and counts.std() < 13
    assert (found[0] == found[1]).float().mean() < 0.01


@pytest.mark.parametrize("length", [2, 3])
@torch.no_grad()
def test_a_model_adds_the_row_of_each_ngram_to_its_tokens_embedding(length: int) -> None:
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=5, max_seq_len=8, n_layers=1, n_heads=2, dim=8, hidden_dim=8, ngrams=(length,), ngram_rows=400
        )
    )
    tokens = torch.randint(5, (2, 8))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].clone()))
    model(tokens)
    (rows,) = ngram_rows(tokens_before(tokens, length), [length], 400, vocab_size=5)
    expected = model.token_embedding.weight[tokens] + model.ngram_embeddings[0].weight[rows]
    assert torch.equal(seen[0], expected)


def test_dropout_of_ngrams_leaves_the_tokens_own_embedding() -> None:
    """In training each feature of a table is doubled or gone, by halves; afterwards all are there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, max_seq_len=64, n_layers=1, n_heads=1, dim=256, hidden_dim=8, ngrams=(2,), ngram_rows=64,
        ngram_dropout=0.5,
    )  # fmt: skip
    model, tokens = Llama(config), torch.randint(5, (1, 64))
    own = model.token_embedding(tokens)
    added = model.eval()._embed(tokens, None) - own
    kept = (model.train()._embed(tokens, None) - own) / added
    assert ((kept - 2).abs() < 1e-3).logical_or(kept.abs() < 1e-3).all()
    assert abs((kept > 1).float().mean().item() - 0.5) < 0.02
