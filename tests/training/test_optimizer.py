"""The step is AdamW's, decays matrices only, clips, and leaves everything alone when a gradient is not finite."""

import copy

import torch
from torch import nn

from cleangpt.config import ModelConfig, OptimizerConfig
from cleangpt.models.base import LanguageModel
from cleangpt.training.optimizer import Optimizer


class Small(LanguageModel):
    """A matrix and three vectors, of no architecture."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(max_seq_len=8))
        self.linear, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)


def model() -> Small:
    torch.manual_seed(0)
    return Small()


def set_gradients(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_steps_are_those_of_plain_adamw_with_rates_and_decays_of_each_step() -> None:
    """The reference is the update rule written out (Loshchilov and Hutter 2019, algorithm 2)."""
    ours, config = model(), OptimizerConfig(lr=1.0, betas=(0.8, 0.9), eps=1e-6, clip_norm=None)
    optimizer = Optimizer(ours, config)
    weights = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step, (lr, decay) in enumerate([(0.1, 0.5), (0.05, 0.2), (0.01, 0.0)], start=1):
        set_gradients(ours, step)
        gradients = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
        optimizer.step(lr, decay)
        for name, weight in weights.items():
            if weight.dim() >= 2:
                weight *= 1 - lr * decay
            first[name] = 0.8 * first[name] + 0.2 * gradients[name]
            second[name] = 0.9 * second[name] + 0.1 * gradients[name] ** 2
            corrected = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            weight -= lr * first[name] / (1 - 0.8**step) / corrected
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name])


def test_the_norm_is_that_before_clipping_and_the_clipped_step_is_smaller() -> None:
    ours = model()
    optimizer = Optimizer(ours, OptimizerConfig(lr=0.1, clip_norm=0.5))
    set_gradients(ours, 1, scale=10)
    expected = torch.cat([parameter.grad.flatten() for parameter in ours.parameters()]).norm()
    torch.testing.assert_close(optimizer.step(0.1, 0.0), expected)
    moment = optimizer.state_dict()["moments"]["linear.weight"]["exp_avg"]
    whole = torch.cat([entry["exp_avg"].flatten() for entry in optimizer.state_dict()["moments"].values()])
    assert moment.shape == (3, 4)
    torch.testing.assert_close(whole.norm() / (1 - 0.9), torch.tensor(0.5), atol=1e-4, rtol=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    ours = model()
    optimizer = Optimizer(ours, OptimizerConfig(lr=0.1))
    set_gradients(ours, 1)
    optimizer.step(0.1, 0.1)
    weights = [parameter.detach().clone() for parameter in ours.parameters()]
    moments = {name: {k: v.clone() for k, v in e.items()} for name, e in optimizer.state_dict()["moments"].items()}
    for bad in (float("nan"), float("inf")):
        set_gradients(ours, 2)
        ours.linear.weight.grad[1, 1] = bad
        assert not optimizer.step(0.1, 0.1).isfinite()
    assert all(torch.equal(one, two) for one, two in zip(weights, ours.parameters(), strict=True))
    for name, entry in optimizer.state_dict()["moments"].items():
        assert all(torch.equal(moments[name][key], entry[key]) for key in entry)
    assert optimizer.skipped.tolist() == [2, 2, 2]
    set_gradients(ours, 3)
    optimizer.step(0.1, 0.1)
    assert optimizer.skipped.tolist() == [2, 0, 2]
    assert not torch.equal(weights[0], ours.linear.weight)


def test_a_reloaded_optimizer_makes_the_same_steps() -> None:
    one = model()
    optimizer = Optimizer(one, OptimizerConfig(lr=0.1))
    set_gradients(one, 1)
    optimizer.step(0.1, 0.1)
    two = model()
    two.load_state_dict(one.state_dict())
    reloaded = Optimizer(two, OptimizerConfig(lr=0.1))
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, each in ((one, optimizer), (two, reloaded)):
        set_gradients(module, 2)
        each.step(0.05, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
