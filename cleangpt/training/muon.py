"""Muon (Jordan et al. 2024): the update of a matrix is its momentum, orthogonalized.

Every direction of the matrix is then updated equally, not only the few that dominate most gradients. With the scale of
Liu et al. 2025 ("Muon is scalable for LLM training", equation 4) an update has the same RMS as AdamW's, so that
learning rate and weight decay mean the same in both.
"""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.distributed.tensors import distribute_like, full_tensor, local_tensor

POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
"""Coefficients a, b, c of a x + b x³ + c x⁵ by iteration, optimal for singular values from 1e-3 to 1 (Amsel et al.
2025, "The Polar Express", algorithm 1); iterations beyond the fifth use the last."""
MARGIN = 1.01
"""Safety factor on the norm, so that rounding takes no singular value above 1 (ibid.)."""


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Replaces the singular values of matrices `(batch, rows, columns)` by values near 1.

    The products run in bf16 on CUDA, which is precise enough (Jordan et al. 2024), and in fp32 elsewhere, because a CPU
    without bf16 arithmetic takes ten times as long.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if transposed := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * MARGIN + 1e-7)
    for iteration in range(iterations):
        a, b, c = POLYNOMIALS[min(iteration, len(POLYNOMIALS) - 1)]
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return (x.mT if transposed else x).to(matrices.dtype)


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer without PyTorch's wrappers around these methods, which would load the compiler at import."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Muon(EagerOptimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for the matrices in a model's blocks.

    Parameters of equal shape are orthogonalized together. A tensor of more than two dimensions is a stack of matrices;
    in a group with `stacked` > 1, each parameter holds that many matrices stacked along its rows. Sharded parameters
    are gathered one at a time, and every device orthogonalizes the full matrix.

    Args:
        groups: parameter groups, as in PyTorch.
        momentum: decay rate of the momentum.
        iterations: passed to `orthogonalize`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, iterations: int) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "stacked": 1})
        self.momentum, self.iterations = momentum, iterations
        self.found_inf = torch.zeros(())
        """The step is skipped if this is more than 0; on the parameters' device, as GradScaler sets it."""

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer state of a parameter, initialised where there is none yet."""
        if not self.state[parameter]:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        state: dict[str, Tensor] = self.state[parameter]
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient, and overwrites the gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates parameters `(..., rows, columns)` of equal shape."""
        bad = self.found_inf.to(parameters[0].device) > 0
        rate = group["lr"] * ~bad
        for parameter in parameters:
            gradient, momentum = local_tensor(parameter.grad), local_tensor(self.moments(parameter)["momentum"])
            gradient.masked_fill_(bad, 0)
            momentum.lerp_(gradient, (1 - self.momentum) * ~bad)
            gradient.lerp_(momentum, self.momentum)
        updates = torch.stack([full_tensor(parameter.grad) for parameter in parameters])
        matrices = updates.reshape(-1, updates.shape[-2] // group["stacked"], updates.shape[-1])
        size = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        updates = orthogonalize(matrices, self.iterations).view_as(updates) * (rate * size)
        for parameter, update in zip(parameters, updates, strict=True):
            local_tensor(parameter).mul_(1 - rate * group["weight_decay"]).sub_(
                local_tensor(distribute_like(update, parameter))
            )
