"""AdamW and Muon with weight decay on matrices only; a step clips the gradient, and skips it if it is not finite."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.config import OptimizerConfig
from cleangpt.distributed.tensors import full_tensor
from cleangpt.models.base import LanguageModel
from cleangpt.models.blocks import hidden_matrices
from cleangpt.training.muon import EagerOptimizer, Muon


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """PyTorch's AdamW, also without the wrapper around its step."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Optimizer:
    """Updates the weights of a model, one step at a time.

    A step whose gradient is not finite leaves weights and moments unchanged. The decision stays on the device: the
    fused kernels read it from `found_inf`, the tensor that GradScaler sets for the same purpose, so the host never
    waits. With `scale_loss`, for fp16, losses are multiplied by a factor that is halved at every such step and doubled
    after 2,000 good ones (Micikevicius et al. 2018, "Mixed precision training", section 3.2).

    Muon, where enabled, updates the matrices in the model's blocks, AdamW everything else. `factors` multiply the
    learning rates of the parameters they name (see `lr_factors`). So do `mup_scales`, which leave the relative decay of
    a step unchanged: wider matrices would otherwise hardly decay.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: OptimizerConfig,
        scale_loss: bool = False,
        factors: Mapping[str, float] | None = None,
        mup_scales: Mapping[str, float] | None = None,
    ) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        named.sort(key=lambda entry: entry[1].dim() < 2)  # matrices first, so that sums over all have one order
        self.config = config
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        by_muon = hidden_matrices(model) if config.muon.lr is not None else set()
        hidden = {name: parameter for name, parameter in named if name in by_muon}
        others = {name: parameter for name, parameter in named if name not in hidden}
        by_layer, by_width = factors or {}, mup_scales or {}
        self.adamw = AdamW(
            _groups(model, others, by_layer, by_width), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self.muon: Muon | None = None
        if hidden:
            groups = _groups(model, hidden, by_layer, by_width, (config.muon.lr or 0.0) / config.lr)
            self.muon = Muon(groups, config.muon.momentum, config.muon.iterations)
        self.hidden = set(hidden.values())
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)
        self.skipped = torch.zeros(3, device=device)
        """Skipped steps: in total, in the current streak, and in the longest streak."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of a loss, scaled for fp16."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float, weight_decay: float) -> Tensor:
        """Updates the weights and clears the gradients.

        Args:
            lr: learning rate of AdamW; Muon's keeps its ratio to it.
            weight_decay: applied to matrices.

        Returns:
            The gradient's norm before clipping, 0-dim, on the device; not finite for a skipped step.
        """
        optimizers: list[torch.optim.Optimizer] = [self.adamw] if self.muon is None else [self.adamw, self.muon]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
                group["weight_decay"] = weight_decay * group["decay"]
            self.scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm: Tensor = full_tensor(torch.nn.utils.get_total_norm(gradients))
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        bad = (~torch.isfinite(norm)).float()
        for optimizer in optimizers:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        total, row, longest = self.skipped
        row = (row + 1) * bad
        self.skipped = torch.stack([total + bad, row, torch.maximum(longest, row)])
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Moments by parameter name, sharded as the parameter is; the counts of skipped steps; the loss scale."""
        moments = {name: self._moments(parameter) for name, parameter in zip(self.names, self.parameters, strict=True)}
        return {"moments": moments, "skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer state of a parameter, initialised where there is none yet."""
        if self.muon is not None and parameter in self.hidden:
            return self.muon.moments(parameter)
        if not self.adamw.state[parameter]:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
            self.adamw.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        moments: dict[str, Tensor] = self.adamw.state[parameter]
        return moments

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, which may contain the same tensors; rates and decays come from the experiment."""
        own = self.state_dict()["moments"]
        for name, entry in state["moments"].items():
            for key, value in entry.items():
                own[name][key].copy_(value)
        self.skipped = state["skipped"].to(self.skipped.device)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _groups(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    by_layer: Mapping[str, float],
    by_width: Mapping[str, float],
    ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """PyTorch's parameter groups, one for each learning-rate factor; `ratio` multiplies all of them."""
    stacked = model.stacked_matrices
    groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        width = by_width.get(name, 1.0)
        decay = 1 / width if parameter.dim() >= 2 else 0.0
        groups.setdefault((ratio * by_layer.get(name, 1.0) * width, decay, stacked(name)), []).append(parameter)
    return [
        {"params": params, "factor": factor, "decay": decay, "stacked": count}
        for (factor, decay, count), params in groups.items()
    ]
