"""Muon's update is the momentum with its singular values near 1; AdamW keeps what is not a matrix of a block."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleangpt.config import MuonConfig, OptimizerConfig
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.training.muon import MARGIN, POLYNOMIALS, Muon, orthogonalize
from cleangpt.training.optimizer import Optimizer

SMALL: dict[str, Any] = {"vocab_size": 11, "max_seq_len": 8, "n_layers": 2, "n_heads": 2, "dim": 8}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix: Tensor, iterations: int) -> Tensor:
    """What `orthogonalize` should give: the polynomials applied to the singular values alone."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt() / MARGIN
    for iteration in range(iterations):
        a, b, c = POLYNOMIALS[min(iteration, 4)]
        values = a * values + b * values**3 + c * values**5
    return (left @ values.diag() @ right).float()


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (1, 5)])
@pytest.mark.parametrize("iterations", [1, 3, 5, 7])
def test_polynomials_act_on_singular_values(shape: tuple[int, int], iterations: int) -> None:
    matrices = random(3, *shape)
    expected = torch.stack([by_singular_values(matrix, iterations) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, iterations), expected, atol=1e-4, rtol=1e-4)


def test_five_iterations_bring_singular_values_from_a_thousandth_to_1_near_1() -> None:
    left, right = (torch.linalg.qr(random(30, 30, seed=seed))[0] for seed in (1, 2))
    matrix = left @ torch.logspace(-3, 0, 30).diag() @ right
    found = torch.linalg.svdvals(orthogonalize(matrix[None], 5)[0])
    assert found.min() > 0.5 and found.max() < 1.2


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4), 5).any()


def parameter(value: Tensor, gradient: Tensor) -> nn.Parameter:
    made = nn.Parameter(value.clone())
    made.grad = gradient.clone()
    return made


def test_a_step_is_the_rule_written_out() -> None:
    """Nesterov momentum, made orthogonal, times 0.2 √(larger side), and decay; parameters of one shape at once."""
    starts = [random(6, 4, seed=seed) for seed in (1, 2)] + [random(4, 4, seed=3)]
    ours = [nn.Parameter(start.clone()) for start in starts]
    muon = Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.5}], momentum=0.9, iterations=4)
    weights, momenta = [start.clone() for start in starts], [torch.zeros_like(start) for start in starts]
    for step in range(3):
        for number, one in enumerate(ours):
            gradient = random(*one.shape, seed=10 * step + number)
            one.grad = gradient.clone()
            momenta[number] = 0.9 * momenta[number] + 0.1 * gradient
            update = by_singular_values(0.1 * gradient + 0.9 * momenta[number], 4)
            size = 0.2 * math.sqrt(max(one.shape))
            weights[number] = weights[number] * (1 - 0.1 * 0.5) - 0.1 * size * update
        muon.step()
    for one, expected in zip(ours, weights, strict=True):
        torch.testing.assert_close(one.detach(), expected, atol=1e-4, rtol=1e-4)


def test_stacks_of_matrices_are_taken_apart() -> None:
    """Experts, stacked in a third dimension, and matrices one above the other move as each would alone."""
    value, gradient = random(3, 4, 6), random(3, 4, 6, seed=1)
    alone = [parameter(value[number], gradient[number]) for number in range(3)]
    stacked = parameter(value, gradient)
    above = parameter(value.flatten(0, 1), gradient.flatten(0, 1))
    for params, count in ((alone, 1), ([stacked], 1), ([above], 3)):
        Muon([{"params": params, "lr": 0.1, "stacked": count}], momentum=0.9, iterations=5).step()
    expected = torch.stack([one.detach() for one in alone])
    torch.testing.assert_close(stacked.detach(), expected)
    torch.testing.assert_close(above.detach().view(3, 4, 6), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SMALL, hidden_dim=12))
    optimizer = Optimizer(model, OptimizerConfig(lr=0.1, muon=MuonConfig(lr=0.1)))

    def step(seed: int, value: float = 0.0) -> None:
        for number, one in enumerate(model.parameters()):
            one.grad = random(*one.shape, seed=seed + number)
        model.blocks[0].mlp.up.weight.grad[0, 0] += value
        optimizer.step(0.1, 0.1)

    def state() -> list[Tensor]:
        moments = optimizer.state_dict()["moments"].values()
        return [tensor.clone() for tensor in [*model.parameters(), *(t for entry in moments for t in entry.values())]]

    step(1)
    before = state()
    step(2, bad)
    assert all(torch.equal(one, two) for one, two in zip(before, state(), strict=True))
    step(3)
    assert not any(torch.equal(one, two) for one, two in zip(before, state(), strict=True))


def test_matrices_of_blocks_are_muons_and_all_else_is_adamws() -> None:
    model = Llama(LlamaConfig(**SMALL, hidden_dim=12, ngrams=(2,), ngram_rows=5))
    moments = Optimizer(model, OptimizerConfig(lr=0.1, muon=MuonConfig(lr=0.1))).state_dict()["moments"]
    by_muon = {name for name, entry in moments.items() if entry.keys() == {"momentum"}}
    assert by_muon == {
        f"blocks.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attention.query", "attention.key", "attention.value", "attention.out",
                     "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip
    assert all(
        entry.keys() == {"step", "exp_avg", "exp_avg_sq"} for name, entry in moments.items() if name not in by_muon
    )


def test_rates_keep_their_ratio_under_the_schedule() -> None:
    model = Llama(LlamaConfig(**SMALL, hidden_dim=12))
    config = OptimizerConfig(lr=0.2, clip_norm=None, muon=MuonConfig(lr=0.05))
    optimizer = Optimizer(model, config, factors={"head.weight": 3.0, "blocks.0.mlp.up.weight": 0.5})
    rates = {}
    optimizer.step(0.1, 0.0)
    assert optimizer.muon is not None
    for group in optimizer.adamw.param_groups + optimizer.muon.param_groups:
        names = {id(one): name for name, one in model.named_parameters()}
        rates |= {names[id(one)]: group["lr"] for one in group["params"]}
    assert rates["token_embedding.weight"] == pytest.approx(0.1)
    assert rates["head.weight"] == pytest.approx(0.3)
    assert rates["blocks.1.mlp.up.weight"] == pytest.approx(0.025)
    assert rates["blocks.0.mlp.up.weight"] == pytest.approx(0.0125)


def test_query_key_and_value_of_each_head_of_gpt_are_matrices_of_their_own() -> None:
    """As the matrices that a Llama of the same size holds apart would move, a head at a time."""
    model = GPT(GPTConfig(**SMALL, bias=False))
    optimizer = Optimizer(model, OptimizerConfig(lr=0.1, clip_norm=None, muon=MuonConfig(lr=0.1, momentum=0.0)))
    for one in model.parameters():
        one.grad = random(*one.shape)
    fused = model.blocks[0].attention.qkv.weight
    before, gradient = fused.detach().clone(), fused.grad.clone()
    optimizer.step(0.1, 0.0)
    moved = (before - fused.detach()) / 0.1 / (0.2 * math.sqrt(8))
    for start in range(0, 24, 4):  # two heads, of each of them query, key and value, four rows each
        torch.testing.assert_close(
            moved[start : start + 4], by_singular_values(gradient[start : start + 4], 5), atol=1e-4, rtol=1e-4
        )


def test_a_reloaded_optimizer_makes_the_same_steps() -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = Llama(LlamaConfig(**SMALL, hidden_dim=12))
        return model, Optimizer(model, OptimizerConfig(lr=0.1, muon=MuonConfig(lr=0.1)))

    def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        for number, one in enumerate(model.parameters()):
            one.grad = random(*one.shape, seed=seed + number)
        optimizer.step(0.1, 0.1)

    one, first = make()
    step(one, first, 1)
    two, second = make()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    step(one, first, 2)
    step(two, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
