"""Tensors, whole or sharded over processes as DTensors, handled alike."""

import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


# Tensors, whole and cut ----------------------------------------------------------------------------------------------
def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`. Loading that class takes half as long as PyTorch; nobody has, where none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tree: Any) -> Any:
    """A state dict with every sharded tensor put together again; all processes must call it together."""
    if is_dtensor(tree):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: full_tensor(value) for key, value in tree.items()}
    return tree


def local_tensor(tensor: Any) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return cast(Tensor, tensor.to_local() if is_dtensor(tensor) else tensor)


def gather_to_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory on the processes that `keep` them, one at a time on a device; all must call it."""
    gathered = {}
    for name, tensor in tensors.items():
        put_together: Tensor = full_tensor(tensor)
        if keep:
            gathered[name] = put_together.detach().cpu()
    return gathered


def distribute_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor that every process has, cut and placed as `reference` is."""
    if not is_dtensor(reference):
        return tensor.to(reference.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = reference
    placed = tensor.to(sharded.to_local().device)
    return distribute_tensor(placed, sharded.device_mesh, sharded.placements, src_data_rank=None)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads whole tensors into a model that may be sharded."""
    current = model.state_dict()
    placed = {
        name: distribute_like(tensor, current[name]) if name in current else tensor for name, tensor in weights.items()
    }
    model.load_state_dict(placed, strict=strict)
