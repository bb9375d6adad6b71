"""GELU's approximation by tanh is PyTorch's, in values, gradients and what is kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cleangpt.models.gelu import gelu_tanh


def values() -> Tensor:
    """Float32 `(8, 1001)`: from -9 to 9, and a few that saturate."""
    x = torch.linspace(-9, 9, 8008).view(8, 1001)
    x[0, :6] = torch.tensor([0.0, -0.0, 1e-30, -60.0, 1e4, -1e4])
    return x


def test_value_and_gradient_are_those_of_float64_as_nearly_as_pytorchs_are() -> None:
    exact = values().double().requires_grad_()
    F.gelu(exact, approximate="tanh").sum().backward()
    ours, pytorch = values().requires_grad_(), values().requires_grad_()
    found, expected = gelu_tanh(ours), F.gelu(pytorch, approximate="tanh")
    found.sum().backward()
    expected.sum().backward()
    truth = F.gelu(exact, approximate="tanh")
    assert exact.grad is not None and ours.grad is not None and pytorch.grad is not None
    assert (found - truth).abs().max() < 2 * (expected - truth).abs().max() < 2e-6
    assert (ours.grad - exact.grad).abs().max() < 3 * (pytorch.grad - exact.grad).abs().max() < 1e-5


def test_without_gradients_it_is_the_same_bit_for_bit_and_keeps_its_argument() -> None:
    x = values()
    with torch.no_grad():
        assert gelu_tanh(x).equal(gelu_tanh(x.clone().requires_grad_()))
    assert gelu_tanh(x).equal(gelu_tanh(x.clone().requires_grad_()).detach()) and x.equal(values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_pytorchs(dtype: torch.dtype) -> None:
    x = values().to(dtype)
    assert gelu_tanh(x).equal(F.gelu(x, approximate="tanh"))


def test_one_tensor_is_kept_for_the_backward_pass() -> None:
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gelu_tanh(values().requires_grad_())
    assert [tensor.shape for tensor in kept] == [(8, 1001)]
