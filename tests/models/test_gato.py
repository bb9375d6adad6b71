"""Gato: a Llama with places of tokens, and bins that begin on a curve."""

import pytest
import torch

from cleangpt.data.timesteps import HIDDEN, NO_PLACE
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.gato import Gato, GatoConfig, curve
from cleangpt.models.llama import Llama, LlamaConfig

SIZES = {"vocab_size": 50, "max_seq_len": 16, "n_layers": 2, "n_heads": 2, "dim": 16}


def built(**fields: object) -> Gato:
    torch.manual_seed(0)
    model = build_model(GatoConfig(**SIZES, n_places=8, **fields))  # type: ignore[arg-type]
    assert isinstance(model, Gato)
    return model.eval()


def test_text_is_read_without_places_as_it_is_beside_observations() -> None:
    """Else a model of a mixture would be asked otherwise than it was trained."""
    model, tokens = built(), torch.randint(50, (2, 9))
    assert torch.equal(model(tokens), model(tokens, places=torch.full((2, 9), NO_PLACE)))
    cache = model.new_cache()
    parts = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))


def test_with_an_embedding_of_no_place_that_is_zero_it_is_a_llama() -> None:
    model, tokens = built(), torch.randint(50, (2, 9))
    torch.nn.init.zeros_(model.place_embedding.weight)
    llama = Llama(LlamaConfig(**SIZES)).eval()  # type: ignore[arg-type]
    weights = model.state_dict()
    del weights["place_embedding.weight"]
    llama.load_state_dict(weights)
    assert torch.equal(model(tokens), llama(tokens))


def test_a_place_is_added_to_the_embedding_and_the_last_one_is_shared() -> None:
    model, tokens = built(), torch.randint(50, (2, 9))
    places = torch.randint(3, 20, (2, 9))
    with torch.no_grad():
        embedded = model._embed(tokens, None, places=places)
    expected = model.token_embedding.weight[tokens] + model.place_embedding.weight[places.clamp(max=7)]
    assert torch.equal(embedded, expected)


def test_a_hidden_token_is_not_seen() -> None:
    model, tokens = built(), torch.randint(50, (1, 9))
    places = torch.zeros(1, 9, dtype=torch.int64)
    places[0, 4] = HIDDEN
    other = tokens.clone()
    other[0, 4] = (tokens[0, 4] + 1) % 50
    assert torch.equal(model(tokens, places=places), model(other, places=places))
    places[0, 4] = HIDDEN - 1
    assert not torch.equal(model(tokens, places=places), model(other, places=places))


def test_bins_begin_on_a_curve() -> None:
    model = built(smooth_bins=(10, 42))
    bins = model.token_embedding.weight[10:42]
    steps = (bins[1:] - bins[:-1]).norm(dim=1)
    apart = (bins[:, None] - bins[None]).norm(dim=2)
    assert steps.max() < apart[0, 16:].min() and apart[0, 16:].min() > 0.5 * bins.norm(dim=1).mean()
    others = model.token_embedding.weight[:10]
    assert 0.5 < bins.std() / others.std() < 2


@pytest.mark.parametrize("bins", [(10, 51), (42, 10), (7, 7)])
def test_a_range_of_bins_that_is_none_is_refused(bins: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"model\.smooth_bins is .*allowed: a range of ids, at most model\.vocab_size"):
        built(smooth_bins=bins)


def test_a_curve_has_the_standard_deviation_that_is_asked_for() -> None:
    torch.manual_seed(0)
    for points in (32, 256, 1024):
        assert 0.8 < curve(points, 256, 0.5).std() / 0.5 < 1.2


def test_scores_are_over_the_scored_ids() -> None:
    model, tokens = built(), torch.randint(50, (2, 9))
    targets = torch.randint(20, 25, (2, 9))
    model.scored_ids = (20, 25)
    scores = model(tokens, targets=targets, scores=["entropy"])
    logprobs = model(tokens)[..., 20:25].log_softmax(-1)
    expected = logprobs.gather(-1, (targets - 20)[..., None])[..., 0]
    assert torch.allclose(scores.logprobs, expected, atol=1e-5)
    assert torch.allclose(scores.entropy, -(logprobs.exp() * logprobs).sum(-1), atol=1e-5)


def test_flops_do_not_count_embeddings_of_places() -> None:
    llama = Llama(LlamaConfig(**SIZES))  # type: ignore[arg-type]
    assert built().flops_per_token(16) == llama.flops_per_token(16)
