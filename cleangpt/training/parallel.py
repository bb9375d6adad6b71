"""One model over many devices, applied from outside the model (design rule 7).

ddp   every device has the whole model; gradients are averaged (Li et al. 2020, "PyTorch Distributed")
fsdp  weights, gradients and moments are cut into one part per device, gathered block by block while they are used
      (Zhao et al. 2023, "PyTorch FSDP"; PyTorch's `fully_shard`)
hsdp  fsdp within groups of devices, copies of it across the groups

Whatever the strategy, what leaves a run (snapshots, checkpoints) has whole tensors under the model's own names, so a
run may go on under another strategy and on another number of devices.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cleangpt.config import ParallelConfig
from cleangpt.errors import UserError
from cleangpt.training.ranks import Ranks


def check_parallel(config: ParallelConfig, world_size: int) -> None:
    """Refuses a strategy that does not fit the number of processes.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    if config.strategy != "hsdp":
        return
    if config.replicas < 2 or world_size % config.replicas or world_size == config.replicas:
        raise UserError(
            f"parallel.replicas is {config.replicas}; allowed with strategy hsdp: a divisor of the {world_size} "
            "processes, neither 1 nor all of them"
        )


def parallelize(
    model: nn.Module, config: ParallelConfig, ranks: Ranks, device: torch.device, compile_model: bool
) -> nn.Module:
    """The model to call in training; `model` itself keeps the parameters, their names and the state dict.

    Args:
        model: on `device`, with the same weights on every process. Sharding cuts its parameters in place, a block
            (an element of `model.blocks`, where it has them) at a time.
        config: the strategy.
        ranks: the processes.
        device: this process's device.
        compile_model: whether to put torch.compile around the model, inside the strategy where it needs that.
    """
    if ranks.world_size == 1:
        return _compiled(model) if compile_model else model
    if config.strategy in ("auto", "ddp"):
        inner = _compiled(model) if compile_model else model
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(inner, device_ids=devices, gradient_as_bucket_view=True)
    shape = (ranks.world_size,) if config.strategy == "fsdp" else (config.replicas, ranks.world_size // config.replicas)
    names = ("shard",) if config.strategy == "fsdp" else ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    return _compiled(model) if compile_model else model


def recompute(model: nn.Module, every: int | None) -> None:
    """Makes every so-many-th block of `model.blocks` compute its activations again in the backward pass.

    Memory for arithmetic (Chen et al. 2016, "Training deep nets with sublinear memory cost"): such a block keeps its
    input alone. Names and results stay the same, those of dropout included.
    """
    for block in list(getattr(model, "blocks", []))[::every] if every else []:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def without_sync(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch: gradients are exchanged between devices after the last one of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return cast("AbstractContextManager[Any]", model.no_sync())
    if isinstance(inner := getattr(model, "_orig_mod", model), FSDPModule):
        inner.set_requires_gradient_sync(last)
    return nullcontext()


def whole(tree: Any) -> Any:
    """A state dict with every sharded tensor put together again; all processes must call it together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    return tree


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, cut and placed as `reference` is."""
    if not isinstance(reference, DTensor):
        return tensor.to(reference.device)
    return distribute_tensor(tensor.to(reference.to_local().device), reference.device_mesh, reference.placements)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads whole tensors into a model that may be sharded."""
    current = model.state_dict()
    placed = {name: like(tensor, current[name]) if name in current else tensor for name, tensor in weights.items()}
    model.load_state_dict(placed, strict=strict)


def _compiled(model: nn.Module) -> nn.Module:
    """The model behind `torch.compile`, with the same parameters."""
    return cast(nn.Module, torch.compile(model))
