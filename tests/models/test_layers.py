"""The optional parts of a Llama do what their papers say, and nothing where they are off."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import NemotronConfig
from transformers.models.nemotron.modeling_nemotron import NemotronMLP

from cleangpt.models.layers import MLP, attention, block_mask, document_ids, document_mask, window_mask
from cleangpt.models.llama import Llama, LlamaConfig

SMALL = LlamaConfig(vocab_size=23, max_seq_len=64, n_layers=3, n_heads=4, n_kv_heads=2, dim=48, hidden_dim=80)
END = 5
APART = replace(SMALL, separator=END)


def llama(config: LlamaConfig) -> Llama:
    torch.manual_seed(0)
    model = Llama(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.eval()


def with_ends(*documents: int) -> Tensor:
    """A sample `(1, seq)` of documents of these lengths, each with its end, but for the last, which is cut off."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(END + 1, 23, (1, sum(documents)), generator=generator)
    for end in torch.tensor(documents).cumsum(0)[:-1]:
        tokens[0, end - 1] = END
    return tokens


# Documents -----------------------------------------------------------------------------------------------------------

each_reach = pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"sliding_window": 4, "global_every": 2}])


def test_a_separator_belongs_to_the_document_it_ends() -> None:
    tokens = torch.tensor([[7, 8, END, 9, END, END, 7], [7, 8, 9, 7, 8, 9, 7]])
    assert document_ids(tokens, END).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


@each_reach
def test_a_token_changes_no_logit_of_another_document(changes: dict[str, Any]) -> None:
    model, tokens = llama(replace(APART, **changes)), with_ends(6, 9, 5)
    for position in (0, 4, 8, 12):
        changed = tokens.clone()
        changed[0, position] = 22 if tokens[0, position] != 22 else 21
        differs = (model(tokens) != model(changed))[0].any(-1)
        document = document_ids(tokens, END)[0]
        assert differs[position] and not differs[document != document[position]].any()


@each_reach
def test_documents_in_one_sample_have_the_logits_of_separate_samples(changes: dict[str, Any]) -> None:
    """And the same gradients: only distances matter to rotary positions."""
    config = replace(APART, **changes)
    model, lengths = llama(config), (6, 9, 1, 5)
    tokens = with_ends(*lengths)
    parts = tokens.split(list(lengths), dim=1)
    plain = llama(replace(config, separator=None))
    together, apart = model(tokens), torch.cat([plain(part) for part in parts], dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    together.logsumexp(-1).sum().backward()
    apart.logsumexp(-1).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_each_sample_of_a_batch_has_its_own_documents() -> None:
    model = llama(APART)
    samples = [with_ends(6, 9, 5), with_ends(12, 8), with_ends(20)]
    torch.testing.assert_close(model(torch.cat(samples)), torch.cat([model(sample) for sample in samples]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(data=st.data(), window=st.sampled_from([None, 1, 3, 20]))
@settings(max_examples=5, deadline=None)
@torch.no_grad()
def test_attention_over_blocks_equals_attention_with_the_mask(data: st.DataObject, window: int | None) -> None:
    """The way of CUDA devices and that of all others, here on the same device."""
    batch, seq = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    tokens = torch.tensor(data.draw(st.lists(st.lists(st.integers(4, 6), min_size=seq, max_size=seq),
                                             min_size=batch, max_size=batch)))  # fmt: skip
    documents = document_ids(tokens, END)
    mask = document_mask(documents)
    if window is not None:
        mask = mask & window_mask(torch.arange(seq), window)
    query, key, value = torch.randn(batch, 4, seq, 8), torch.randn(batch, 2, seq, 8), torch.randn(batch, 2, seq, 8)
    by_blocks = attention(query, key, value, block_mask(documents, window, seq, query.device))
    torch.testing.assert_close(by_blocks, attention(query, key, value, mask), atol=1e-5, rtol=1e-5)


# The others ----------------------------------------------------------------------------------------------------------


def test_a_value_residual_averages_with_the_first_blocks_values() -> None:
    """A plain model gives the same where the mean is taken from outside (Zhou et al. 2024)."""
    tokens, plain = with_ends(12), llama(SMALL)
    first: list[Tensor] = []

    def mean(module: nn.Module, inputs: Any, values: Tensor) -> Tensor:
        first.append(values)
        return 0.5 * values + 0.5 * first[0]

    for block in plain.blocks:
        block.attention.value.register_forward_hook(mean)
    torch.testing.assert_close(llama(replace(SMALL, value_residual=True))(tokens), plain(tokens), atol=1e-5, rtol=1e-5)


def test_dropout_takes_its_share_of_embeddings_attention_and_mlp_in_training_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the same model with the dropped activations given: everything but them stays."""
    tokens, plain = with_ends(12), llama(SMALL)
    dropping = llama(replace(SMALL, dropout=0.25))
    assert torch.equal(plain(tokens), dropping(tokens))
    shapes: list[tuple[int, ...]] = []

    def halve(x: Tensor, share: float, training: bool) -> Tensor:
        assert share == 0.25 and training
        shapes.append(tuple(x.shape))
        return x / 2

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", halve)
        halved = dropping.train()(tokens)
    assert shapes == [(1, 12, 48)] * (1 + 2 * 3)
    for name, parameter in plain.named_parameters():
        if name == "token_embedding.weight" or name.endswith(("out.weight", "down.weight")):
            parameter.data /= 2
    torch.testing.assert_close(halved, plain(tokens))
    assert not torch.equal(dropping(tokens), dropping(tokens))


def test_a_soft_cap_bends_the_logits() -> None:
    tokens = with_ends(12)
    logits, capped = llama(SMALL)(tokens), llama(replace(SMALL, logit_soft_cap=2.0))(tokens)
    assert logits.abs().max() > 2 > capped.abs().max()
    torch.testing.assert_close(capped, 2 * (logits / 2).tanh())


def test_relu_squared_is_that_of_hugging_faces_nemotron() -> None:
    theirs = NemotronMLP(NemotronConfig(hidden_size=12, intermediate_size=20, hidden_act="relu2", mlp_bias=False))
    ours = MLP(12, 20, gated=False)
    ours.up.weight.data, ours.down.weight.data = theirs.up_proj.weight.data, theirs.down_proj.weight.data
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    assert {name for name, _ in ours.named_parameters()} == {"up.weight", "down.weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {"value_residual": True},
        {"logit_soft_cap": 30.0},
        {"separator": END},
        {"n_experts": 4, "bias_update_rate": 0.001},
    ],
)
def test_an_optional_part_changes_no_other_initial_weight(changes: dict[str, Any]) -> None:
    """So runs with and without it start alike; it adds no matrix."""
    plain = replace(SMALL, n_experts=changes.get("n_experts"))
    torch.manual_seed(0)
    without = dict(Llama(plain).named_parameters())
    torch.manual_seed(0)
    for name, parameter in Llama(replace(SMALL, **changes)).named_parameters():
        assert torch.equal(parameter, without.get(name, torch.zeros(4))), name
