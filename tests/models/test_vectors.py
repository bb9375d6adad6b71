"""Vectors of numbers at tokens: where their embeddings go, and what is refused."""

from typing import Any

import pytest
import torch

from cleangpt.data.records import Records
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.gato import Gato, GatoConfig
from cleangpt.models.vectors import check_vectors


def built(**fields: Any) -> Gato:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "max_seq_len": 12, "n_layers": 2, "n_heads": 2, "dim": 16}
    model = build_model(GatoConfig(**sizes, **({"vector": 3} | fields)))
    assert isinstance(model, Gato)
    return model


@torch.no_grad()
def test_a_vector_is_embedded_by_an_mlp_at_its_token_and_elsewhere_tokens_are() -> None:
    model, tokens, places = built(), torch.randint(20, (2, 6)), torch.randint(3, 9, (2, 6))
    vectors, ends = torch.randn(2, 2, 3), torch.tensor([[2, 5], [6, 0]])
    embedded = model._embed(tokens, None, places=places, vectors=vectors, vectors_ends=ends)
    mlp = torch.nn.Sequential(model.vectors.first, torch.nn.GELU(), model.vectors.second)  # type: ignore[union-attr]
    expected = model.token_embedding(tokens)
    for row, number, at in [(0, 0, 1), (0, 1, 4), (1, 0, 5)]:
        expected[row, at] = mlp(vectors[row, number])
    torch.testing.assert_close(embedded, expected + model.place_embedding(places))


@torch.no_grad()
def test_a_vector_outside_of_the_row_is_left_out() -> None:
    model, tokens = built().eval(), torch.randint(20, (1, 6))
    outside = {"vectors": torch.randn(1, 2, 3), "vectors_ends": torch.tensor([[0, 7]])}
    assert torch.equal(model(tokens, **outside), model(tokens))
    plain = built(vector=0).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("given", [True, False])
def test_without_vectors_the_parameters_get_zeros_as_gradients(given: bool) -> None:
    model = built()
    none = {"vectors": torch.zeros(2, 0, 3), "vectors_ends": torch.zeros(2, 0, dtype=torch.int64)}
    model(
        torch.randint(20, (2, 6)), places=torch.zeros(2, 6, dtype=torch.int64), **(none if given else {})
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and name.startswith("vectors.") == (not parameter.grad.any()), name


def test_vectors_of_another_size_are_refused() -> None:
    records = {"vectors": Records(dtype="float32", shape=(4,))}
    with pytest.raises(UserError, match=r"model\.vector is 3; allowed: 4, corpus\.modalities\.vector"):
        check_vectors(built().config, records)
    check_vectors(built(vector=4).config, records)
