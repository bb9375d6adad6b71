"""One of the processes of tests/checkpoints/test_snapshots.py, each of which calls `main`.

It saves a state whose tensors are sharded by a layout as FOLDER/LAYOUT/mb000001, and loads every snapshot that other
layouts have left in FOLDER into tensors sharded alike, which must then be the saved ones, bit for bit.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from cleangpt.checkpoints.snapshots import Snapshots, load_snapshot
from cleangpt.config import SavingConfig
from cleangpt.distributed.processes import Ranks

SHAPES = {"fsdp": (-1,), "hsdp": (2, 2), "tp": (-1,), "fsdp_tp": (2, 2)}


def model() -> nn.Sequential:
    """Sizes that neither two nor four processes divide, and a bias that leaves some of four with nothing."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 14), nn.Linear(14, 3), nn.LayerNorm(3, bias=False))


def cut(layout: str) -> nn.Sequential:
    """The model, cut over the processes."""
    whole = model()
    if layout == "ddp":
        return whole
    names = ("shard",) if layout == "fsdp" else ("tensor",) if layout == "tp" else ("replicate", "shard")
    names = ("shard", "tensor") if layout == "fsdp_tp" else names
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", tuple(size if n < 0 else n for n in SHAPES[layout]), mesh_dim_names=names)
    if "tensor" in names:
        parallelize_module(whole, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    if "shard" in names:
        over = mesh["shard"] if "tensor" in names else mesh
        for layer in whole:
            fully_shard(layer, mesh=over)
    return whole


def state_of(module: nn.Module) -> dict[str, Any]:
    """A state as the trainer's: weights, moments, tensors that no one cuts, and the rest."""
    weights = dict(module.state_dict())
    moments = {name: {"exp_avg": -weight, "step": torch.tensor(4.0)} for name, weight in weights.items()}
    return {
        "model": weights,
        "moments": moments,
        "sums": torch.arange(2, dtype=torch.float64),
        "more": [1, {"x": None}],
    }


def blank(tree: Any) -> Any:
    """The same tree with other values in its tensors, which it does not share."""
    if isinstance(tree, dict):
        return {key: blank(value) for key, value in tree.items()}
    return tree.detach().clone().fill_(9) if isinstance(tree, Tensor) else tree


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same(one: Any, two: Any) -> None:
    """Bit for bit, cut alike."""
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert one.shape == two.shape and one.dtype == two.dtype and torch.equal(local(one), local(two))
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    else:
        assert one == two


def main(layout: str, rank: int, processes: int, folder: Path) -> None:
    """Joins the others, and does what the head of this file says."""
    rendezvous = f"file://{folder.resolve()}/rendezvous_{layout}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    save_and_load(layout, Ranks(rank, rank, processes), folder)
    dist.barrier()
    dist.destroy_process_group()


def save_and_load(layout: str, ranks: Ranks, folder: Path) -> None:
    state = state_of(cut(layout))
    snapshots = Snapshots(folder / layout, SavingConfig(), ranks)
    saved = blank(state)
    for name, tensor in tensors_of(state).items():
        local(tensors_of(saved)[name]).copy_(local(tensor))
    snapshots.save("mb000001", saved)
    for tensor in tensors_of(saved).values():
        local(tensor).zero_()  # at once, as training would
    snapshots.wait()
    for path in sorted(folder.glob("*/mb000001")):
        into = blank(state)
        assert_same(load_snapshot(path, into, snapshots.group), state)
        assert_same(into, state)


def tensors_of(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of a tree of dicts."""
    if isinstance(tree, Tensor):
        return {path: tree.detach()}
    children = tree.items() if isinstance(tree, dict) else ()
    return {name: tensor for key, child in children for name, tensor in tensors_of(child, f"{path}/{key}").items()}
