"""A mixture of experts computes for each token what its experts would, and every expert learns in every step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock

from cleangpt.models.layers import MLP
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.models.moe import MixtureOfExperts, count_sorted


def mixture(**changes: Any) -> MixtureOfExperts:
    torch.manual_seed(0)
    sizes = {"dim": 12, "hidden_dim": 20, "n_experts": 5, "experts_per_token": 2} | changes
    model = MixtureOfExperts(**({"normalize_router_weights": True, "shared": None} | sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def one_by_one(model: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, expert by expert, as the formula says (Jiang et al. 2024, section 2.1)."""
    outputs = []
    for token in x.flatten(0, 1):
        probabilities = (model.router.weight @ token).softmax(0)
        scores = probabilities if model.router_bias is None else probabilities + model.router_bias
        chosen = scores.sort(descending=True).indices[: model.experts_per_token]
        whole = probabilities[chosen].sum() if model.normalize_router_weights else 1
        output = torch.zeros_like(token)
        for expert in chosen:
            up = model.up[expert] @ token
            hidden = up.clamp(min=0) ** 2 if model.gate is None else F.silu(model.gate[expert] @ token) * up
            output = output + probabilities[expert] / whole * (model.down[expert] @ hidden)
        outputs.append(output)
    return torch.stack(outputs).view_as(x)


@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 9),
    n_experts=st.integers(1, 7),
    experts_per_token=st.integers(1, 7),
    options=st.fixed_dictionaries(dict.fromkeys(("normalize_router_weights", "gated", "balanced"), st.booleans())),
)
@settings(max_examples=40)
def test_each_token_gets_what_its_experts_compute(
    batch: int, seq: int, n_experts: int, experts_per_token: int, options: dict[str, bool]
) -> None:
    model = mixture(n_experts=n_experts, experts_per_token=min(n_experts, experts_per_token), **options)
    x = torch.randn(batch, seq, 12)
    torch.testing.assert_close(model(x), one_by_one(model, x), atol=1e-4, rtol=1e-4)


def test_shared_experts_and_biases_are_those_of_hugging_faces_ernie() -> None:
    sizes = {"hidden_size": 12, "moe_intermediate_size": 20, "moe_num_experts": 5, "moe_k": 2}
    theirs = Ernie4_5_MoeSparseMoeBlock(Ernie4_5_MoeConfig(**sizes, moe_num_shared_experts=2))
    ours = mixture(shared=MLP(12, 40), balanced=True)
    theirs.gate.weight.data = ours.router.weight.data
    theirs.gate.moe_statics.e_score_correction_bias.data = ours.router_bias.data[None]
    theirs.experts.gate_up_proj.data = torch.cat([ours.gate, ours.up], dim=1).data
    theirs.experts.down_proj.data = ours.down.data
    assert ours.router_bias.abs().max() > 0.5
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    for name, parameter in theirs.shared_experts.named_parameters():
        part, _, kind = name.partition(".")
        parameter.data = ours.shared.get_parameter(f"{names[part]}.{kind}").data
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    """Without one, processes that exchange gradients would wait for it."""
    model = mixture(experts_per_token=1)
    x = torch.randn(1, 1, 12)
    model(x).sum().backward()
    chosen = int(model.route(x.flatten(0, 1))[0])
    for weights in (model.gate, model.up, model.down):
        assert weights.grad is not None
        assert [bool(gradient.any()) for gradient in weights.grad] == [index == chosen for index in range(5)]


def test_the_router_learns_from_its_weights() -> None:
    model = mixture()
    model(torch.randn(2, 6, 12)).square().sum().backward()
    assert model.router.weight.grad is not None and model.router.weight.grad.any()


def test_the_bias_has_no_gradient_and_changes_no_router_weight() -> None:
    model, x = mixture(experts_per_token=5, normalize_router_weights=False, balanced=True), torch.randn(6, 12)
    expert_ids, router_weights = model.route(x)
    probabilities = model.router(x).softmax(-1)
    torch.testing.assert_close(router_weights, probabilities.gather(-1, expert_ids))
    model(x[None]).sum().backward()
    assert model.router_bias.grad is None and not model.router_bias.requires_grad


def test_under_autocast_router_weights_stay_float32_and_the_output_is_close() -> None:
    model, x = mixture(), torch.randn(2, 6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = model(x)
        assert model.route(x.flatten(0, 1))[1].dtype == torch.float32
    assert reduced.dtype == torch.bfloat16
    # A token between two experts may go to the other one in bfloat16, so most rather than all are near.
    assert ((reduced - model(x)).abs().amax(dim=-1) < 0.1 * model(x).abs().max()).float().mean() > 0.8


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_flops_count_the_experts_that_a_token_is_routed_to(activation: str) -> None:
    config = LlamaConfig(
        vocab_size=97, max_seq_len=32, n_layers=2, n_heads=4, dim=48, hidden_dim=80, n_experts=6, experts_per_token=2,
        expert_hidden_dim=24, n_shared_experts=1, activation=activation, bias_update_rate=0.001,
    )  # fmt: skip
    model, tokens = Llama(config), torch.randint(97, (2, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert model.flops_per_token(32) * tokens.numel() == counter.get_total_flops()


@pytest.mark.slow
def test_the_sizes_are_those_published_for_mixtral_and_qwen3() -> None:
    """46,702,792,704 parameters of Mixtral 8x7B, 30,532,122,624 of Qwen3-30B-A3B."""
    mixtral = LlamaConfig(
        vocab_size=32000, max_seq_len=32768, n_layers=32, n_heads=32, n_kv_heads=8, dim=4096, hidden_dim=14336,
        n_experts=8, experts_per_token=2,
    )  # fmt: skip
    qwen3 = LlamaConfig(
        vocab_size=151936, max_seq_len=40960, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, dim=2048,
        hidden_dim=6144, qk_norm=True, n_experts=128, experts_per_token=8, expert_hidden_dim=768,
    )  # fmt: skip
    for config, published in ((mixtral, 46_702_792_704), (qwen3, 30_532_122_624)):
        with torch.device("meta"):
            model = Llama(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.default(1)
@pytest.mark.parametrize("shared", [0, 2])
def test_it_learns(shared: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, max_seq_len=8, n_layers=1, n_heads=2, dim=16, hidden_dim=16, n_experts=4, n_shared_experts=shared
    )
    model, tokens = Llama(config), torch.randint(11, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# On a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_a_grouped_product_computes_what_one_product_after_another_does(gated: bool) -> None:
    """What CUDA devices do in bf16, here on the CPU; the third expert has no tokens, and gets a gradient of zero."""
    model, counts = mixture(dim=16, hidden_dim=24, n_experts=4, gated=gated).bfloat16(), torch.tensor([5, 1, 0, 9])
    tokens, outer = torch.randn(2, 15, 16, dtype=torch.bfloat16)
    results = []
    for compute in (model.grouped, model.one_by_one):
        model.zero_grad()
        output = compute(tokens, counts)
        output.backward(outer)
        results.append([output, *(weight.grad for name, weight in model.named_parameters() if name != "router.weight")])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    assert not results[0][1][2].any()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_sorted_experts_are_counted_as_bincount_counts_them(ids: list[int]) -> None:
    assert torch.equal(count_sorted(torch.tensor(sorted(ids)), 7), torch.tensor(ids).bincount(minlength=7))
