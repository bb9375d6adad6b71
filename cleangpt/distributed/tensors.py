"""Full tensors and sharded ones (`DTensor`), handled alike."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is sharded, a `DTensor`; by name, since importing the class takes half as long as PyTorch."""
    return type(tensor).__name__ == "DTensor"


def full_tensor(tree: Any) -> Any:
    """A tensor, or every tensor of a state dict, gathered from all ranks; a collective."""
    if is_dtensor(tree):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: full_tensor(value) for key, value in tree.items()}
    return tree


def local_tensor(tensor: Any) -> Tensor:
    """This rank's shard of a tensor, sharing its memory."""
    return cast(Tensor, tensor.to_local() if is_dtensor(tensor) else tensor)


def gather_to_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gathers full tensors one at a time and keeps them in host memory on the ranks with `keep`; a collective."""
    gathered = {}
    for name, tensor in tensors.items():
        full: Tensor = full_tensor(tensor)
        if keep:
            gathered[name] = full.detach().cpu()
    return gathered


def distribute_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Shards a full tensor that every rank has, with the device mesh and placements of `reference`."""
    if not is_dtensor(reference):
        return tensor.to(reference.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = reference
    local = tensor.to(sharded.to_local().device)
    return distribute_tensor(local, sharded.device_mesh, sharded.placements, src_data_rank=None)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads full tensors into a model that may be sharded."""
    current = model.state_dict()
    sharded = {
        name: distribute_like(tensor, current[name]) if name in current else tensor for name, tensor in weights.items()
    }
    model.load_state_dict(sharded, strict=strict)
