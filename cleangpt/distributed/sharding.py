"""Shards a model with PyTorch's `DTensor`: tensor parallelism by the architecture's plan, then FSDP.

Imported only when a layout is sharded, because importing `DTensor` takes half as long as importing PyTorch.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cleangpt.distributed.layout import Layout
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel

# PyTorch warns when a matrix sharded in two dimensions takes two collectives to gather, and when gloo, which has no
# all-to-all, falls back to another collective. Both are expected here.
for name in ("torch.distributed.tensor._redistribute", "torch.distributed.tensor._collective_utils"):
    logging.getLogger(name).setLevel(logging.ERROR)


def shard_model(
    model: LanguageModel,
    layout: Layout,
    mesh: DeviceMesh,
    gather_dtype: torch.dtype | None,
    reshard_after_forward: bool,
) -> None:
    """Shards a model in place; arguments as for `parallelize`.

    Raises:
        UserError: the architecture does not support tensor parallelism over `layout.tensor` ranks.
    """
    if layout.tensor > 1:
        _apply_tensor_parallelism(model, mesh["tensor"])
    if layout.shards > 1:
        # Inputs are not cast: activations have this dtype already, but for what a model keeps in fp32 on purpose.
        policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fsdp_mesh = mesh["replicate", "shard"] if layout.replicas > 1 else mesh["shard"]
        for block in model.layers():
            fully_shard(block, mesh=fsdp_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=fsdp_mesh, mp_policy=policy)


class Replicated(ParallelStyle):
    """A module that every rank has whole and computes alike: activations are gathered before it and sharded along the
    sequence after it. Its other inputs are the same on all ranks, and it draws nothing at random."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute_module(module, mesh)
        plain, everywhere = _Plain(module), [Replicate()]

        def forward(activations: DTensor, *others: Tensor | None) -> DTensor:
            whole = activations.redistribute(mesh, everywhere).to_local(grad_placements=everywhere)
            parameters: dict[str, Any] = dict(plain.named_parameters())
            local = {name: weight.to_local(grad_placements=everywhere) for name, weight in parameters.items()}
            found = torch.func.functional_call(plain, local, (whole, *others))
            return DTensor.from_local(found, mesh, everywhere, run_check=False).redistribute(mesh, [Shard(1)])

        module.forward = forward
        return module


class _Plain(nn.Module):
    """A module's own `forward`, whatever has taken its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.own = module, module.forward

    def forward(self, *inputs: Any) -> Any:
        return self.own(*inputs)


# The entries of a `tensor_plan`. Between modules, activations `(batch, seq, dim)` are sharded along the sequence.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    # An embedding sharded along its vocabulary; each rank looks up the tokens it holds.
    "vocabulary": lambda: RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    ),
    # An embedding sharded along its features, so it may have fewer entries than there are ranks.
    "positions": lambda: ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False),
    # A norm over features: replicated, each rank applies it to its shard of the sequence.
    "sequence": lambda: SequenceParallel(),
    # A linear layer sharded along its outputs: all-gathers the sequence; outputs stay sharded by feature.
    "column": lambda: ColwiseParallel(input_layouts=Shard(1)),
    # A linear layer sharded along its inputs: reduce-scatters the outputs along the sequence.
    "row": lambda: RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    # A module that is not sharded, such as an encoder of images.
    "replicated": lambda: Replicated(),
    # A norm within each head `(batch, seq, heads, head_dim)`: replicated, each rank applies it to its own heads.
    "heads": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
    # The output head, sharded along the vocabulary.
    "logits": lambda: ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
}  # fmt: skip


def _apply_tensor_parallelism(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallelism by the architecture's own plan; frozen parameters stay frozen."""
    plan = model.tensor_plan
    if not plan:
        raise UserError(f"{type(model).__name__} has no tensor_plan for tensor parallelism; use strategy fsdp")
    _check_divisible(model, plan, mesh.size())
    replicated = tuple(f"{name}." for name, style in plan.items() if style == "replicated")
    for name, _ in model.named_parameters():
        if _pattern(name.rpartition(".")[0]) not in plan and not name.startswith(replicated):
            raise UserError(
                f"{name} has no entry in the tensor_plan of {type(model).__name__}; add one, or use strategy fsdp"
            )
    present = {_pattern(name) for name, _ in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan.items() if name in present})
    # A single token cannot be sharded along the sequence, so generation recomputes the full sequence.
    model.can_cache = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def _pattern(name: str) -> str:
    """A module's name with ``*`` for every number, as in a tensor plan."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


def _check_divisible(model: LanguageModel, plan: Mapping[str, str], size: int) -> None:
    """Refuses a tensor-parallel size that would split a head, or shard features unevenly."""
    config: Any = model.config
    for field in ("n_heads", "n_kv_heads"):
        if (count := getattr(config, field, None)) is not None and count % size:
            raise UserError(f"model.{field} is {count}; allowed with tensor parallelism over {size}: a multiple of it")
    for name, module in model.named_modules():
        pattern = _pattern(name)
        if isinstance(module, nn.Embedding) and plan.get(pattern) == "vocabulary":
            entries = module.num_embeddings
            if -(-entries // size) * (size - 1) >= entries:
                raise UserError(f"{name} has {entries} entries, too few for tensor parallelism over {size}")
        if isinstance(module, nn.Linear) and plan.get(pattern) in ("column", "row"):
            features = module.out_features if plan[pattern] == "column" else module.in_features
            if features % size:
                raise UserError(
                    f"{name} has {features} features; allowed with tensor parallelism over {size}: a multiple of it"
                )
