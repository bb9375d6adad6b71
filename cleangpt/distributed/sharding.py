"""The model's parts on each device, by PyTorch's `DTensor`: `parallel.py` decides what is cut, this cuts it.

Loaded only where something is cut: it takes the start of a run half as long again as PyTorch does.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
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

# A part of a matrix that is cut twice takes two collectives to put together, and gloo has no all-to-all; PyTorch would
# warn of each.
for name in ("torch.distributed.tensor._redistribute", "torch.distributed.tensor._collective_utils"):
    logging.getLogger(name).setLevel(logging.ERROR)


def cut(
    model: LanguageModel, layout: Layout, mesh: DeviceMesh, gather_dtype: torch.dtype | None, reshard_after_forward: bool
) -> None:
    """Cuts a model in layout, as `parallelize` says.

    Raises:
        UserError: the architecture cannot be cut into `layout.tensor` parts.
    """
    if layout.tensor > 1:
        _cut_matrices(model, mesh["tensor"])
    if layout.shards > 1:
        # Activations have that dtype already; what a model keeps in fp32 for exactness stays so.
        policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        inner = mesh["replicate", "shard"] if layout.replicas > 1 else mesh["shard"]
        for block in model.layers():
            fully_shard(block, mesh=inner, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=inner, mp_policy=policy)


# The words of an architecture's `tensor_plan`: between the modules, activations `(batch, seq, dim)` are cut along seq.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    # An embedding, cut by its entries; a device looks up those that it has.
    "vocabulary": lambda: RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    ),
    # One cut by its features, so that there may be fewer entries than devices.
    "positions": lambda: ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False),
    # A norm over features, whole on every device, each of which has a part of the sequence.
    "sequence": lambda: SequenceParallel(),
    # A linear layer cut by its outputs: gathers the sequence, and leaves each device its own features.
    "column": lambda: ColwiseParallel(input_layouts=Shard(1)),
    # One cut by its inputs: adds up the parts, and leaves each device its part of the sequence.
    "row": lambda: RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    # A norm within each head `(batch, seq, heads, head_dim)`, whole on every device, each of which has its own heads.
    "heads": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
    # The last linear layer, cut by its outputs, the vocabulary.
    "logits": lambda: ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
}  # fmt: skip


def _cut_matrices(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallelism by the architecture's own plan; what requires no gradient stays so."""
    plan = model.tensor_plan
    if not plan:
        raise UserError(f"{type(model).__name__} has no tensor_plan, so its matrices cannot be cut; use strategy fsdp")
    _check_divisible(model, plan, mesh.size())
    for name, _ in model.named_parameters():
        if _pattern(name.rpartition(".")[0]) not in plan:
            raise UserError(
                f"{name} has no entry in the tensor_plan of {type(model).__name__}, so its matrices cannot be cut; "
                "use strategy fsdp, or add one"
            )
    present = {_pattern(name) for name, _ in model.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh, {name: STYLES[word]() for name, word in plan.items() if name in present})
    # Generation then reads whole sequences: a token alone cannot be cut along the sequence.
    model.can_cache = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])


def _pattern(name: str) -> str:
    """A module's name with ``*`` for every number, as it stands in a plan."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


def _check_divisible(model: LanguageModel, plan: Mapping[str, str], parts: int) -> None:
    """Refuses a number of parts that would cut through a head, or cut features unevenly."""
    config: Any = model.config
    for field in ("n_heads", "n_kv_heads"):
        if (count := getattr(config, field, None)) is not None and count % parts:
            raise UserError(f"model.{field} is {count}; allowed with matrices cut in {parts}: a multiple of that")
    for name, module in model.named_modules():
        pattern = _pattern(name)
        if isinstance(module, nn.Embedding) and plan.get(pattern) == "vocabulary":
            entries = module.num_embeddings
            if -(-entries // parts) * (parts - 1) >= entries:
                raise UserError(f"{name} has {entries} entries, too few to cut in {parts}")
        if isinstance(module, nn.Linear) and plan.get(pattern) in ("column", "row"):
            size = module.out_features if plan[pattern] == "column" else module.in_features
            if size % parts:
                raise UserError(f"{name} has {size} features; allowed with matrices cut in {parts}: a multiple of that")
