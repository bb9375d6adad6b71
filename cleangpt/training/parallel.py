"""One model over many devices, applied from outside the model (design rule 7).

ddp   every device has the whole model; gradients are averaged (Li et al. 2020, "PyTorch Distributed")
fsdp  weights, gradients and moments are cut into one part per device, gathered block by block while they are used
      (Zhao et al. 2023, "PyTorch FSDP"; PyTorch's `fully_shard`)
hsdp  fsdp within groups of devices, copies of it across the groups
tp    every matrix is cut, and so is the work with it (Shoeybi et al. 2019, "Megatron-LM"); between the matrices, the
      sequence is cut (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models")

With `parallel.tensor`, neighbouring devices share a part of fsdp or hsdp as in tp. Whatever the strategy, tensors keep
the model's own names and whole shapes in all that leaves a run, so that a run may go on under another strategy and on
another number of devices.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cleangpt.config import ModelConfig, ParallelConfig, TrainingConfig
from cleangpt.errors import UserError
from cleangpt.models import NothingDrawn, build_model, model_class, on_meta
from cleangpt.training.device import device_memory
from cleangpt.training.ranks import Ranks


def state_bytes(model: nn.Module) -> int:
    """Bytes of all weights, and of a gradient and two moments of each that trains, in fp32."""
    return sum(parameter.numel() * (16 if parameter.requires_grad else 4) for parameter in model.parameters())


# Which device does what ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The processes as a box: copies of the model x parts of a copy x parts of each matrix; the last are neighbours."""

    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into; those who share a matrix see the same part."""
        return self.replicas * self.shards

    def part(self, rank: int) -> int:
        """The part of each batch that a process sees."""
        return rank // self.tensor

    @property
    def sharded(self) -> bool:
        """Whether a process holds parts of tensors."""
        return self.shards * self.tensor > 1

    def mesh(self, device: torch.device, timeout: timedelta | None = None) -> DeviceMesh:
        """The box in PyTorch's terms; its groups wait for each other as long as `timeout` (None: PyTorch's own)."""
        names = ("replicate", "shard", "tensor")
        mesh = init_device_mesh(device.type, (self.replicas, self.shards, self.tensor), mesh_dim_names=names)
        if timeout is not None:
            for group in mesh.get_all_groups():
                _set_pg_timeout(timeout, group)  # they do not take over that of the group of all
        return mesh


def layout(config: ParallelConfig, world_size: int) -> Layout:
    """How a strategy uses so many processes; `auto` counts as ddp.

    Raises:
        UserError: the strategy does not fit the number of processes.
    """
    strategy, tensor = config.strategy, config.tensor
    if tensor > 1 and strategy not in ("fsdp", "hsdp"):
        raise UserError(f"parallel.tensor is {tensor}; allowed with strategy {strategy}: 1 (fsdp and hsdp take more)")
    if world_size == 1:
        return Layout()
    if world_size % tensor:
        raise UserError(f"parallel.tensor is {tensor}; allowed: a divisor of the {world_size} processes")
    parts = world_size // tensor
    if strategy == "hsdp":
        if config.replicas < 2 or parts % config.replicas or parts == config.replicas:
            among = f"{world_size} processes" if tensor == 1 else f"{parts} groups of {tensor} processes"
            raise UserError(
                f"parallel.replicas is {config.replicas}; allowed with strategy hsdp: a divisor of the {among}, "
                "neither 1 nor all of them"
            )
        return Layout(config.replicas, parts // config.replicas, tensor)
    if strategy == "fsdp":
        return Layout(1, parts, tensor)
    return Layout(1, 1, world_size) if strategy == "tp" else Layout(world_size)


def check_compilation(compiled: str, place: Layout, device: torch.device) -> None:
    """Refuses to compile over gloo where matrices are cut: one run in some thirty has ended in a corrupted heap there.

    Raises:
        UserError: names the field and what is allowed.
    """
    if compiled != "off" and place.tensor > 1 and device.type == "cpu":
        raise UserError(f"training.compile is {compiled!r}; allowed on CPUs with matrices cut: off; it is not reliable")


def check_loss_chunk(training: TrainingConfig, model: ModelConfig, place: Layout) -> None:
    """Refuses a loss in chunks where the head is not this process's own, or cannot be called apart from the model.

    Raises:
        UserError: names the field and what is allowed.
    """
    asked = f"training.loss_chunk is {training.loss_chunk}"
    if training.loss_chunk is None:
        return
    if place.tensor > 1:
        raise UserError(f"{asked}; allowed where matrices are cut: None, for the logits are cut as well")
    if training.compile == "model":
        raise UserError(f"{asked}; allowed with training.compile model: None; compile blocks instead")
    if "reduce" not in inspect.signature(model_class(model).forward).parameters:
        raise UserError(f"{asked}; allowed with {model_class(model).__name__}: None, for its forward takes no reduce")


def check_devices(device: torch.device, processes: int) -> None:
    """Refuses a device that several processes would have to share, or that has no means to exchange.

    Raises:
        UserError: names the field and what is allowed.
    """
    if processes > 1 and (device.type == "mps" or device.index is not None):
        allowed = "cpu, or cuda, of which each takes its own"
        raise UserError(f"training.device is {str(device)!r}; allowed with {processes} processes: {allowed}")


def choose_layout(
    config: ParallelConfig,
    model: ModelConfig,
    ranks: Ranks,
    device: torch.device,
    restrict: Callable[[nn.Module], None] = lambda model: None,
) -> Layout:
    """`layout`, where `auto` becomes fsdp if weights, gradients and moments take more than half of the memory.

    `restrict` changes a model so that what does not train requires no gradient.
    """
    if config.strategy == "auto" and ranks.world_size > 1:
        with on_meta():
            plain = build_model(model)
        restrict(plain)
        needed, memory = state_bytes(plain), device_memory(device)
        fits = memory is None or needed <= memory / 2
        # Processes may see different amounts of memory; the main one decides for all.
        config = replace(config, strategy=ranks.from_main("ddp" if fits else "fsdp"))
    return layout(config, ranks.world_size)


# From a plain model to one spread over devices ------------------------------------------------------------------------


def parallelize(
    build: Callable[[], nn.Module],
    place: Layout,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    *,
    gather_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    timeout: timedelta | None = None,
) -> nn.Module:
    """The model, with this process's part of its parameters on `device`, holding the same values whatever the layout.

    A model whose class has an `init_parameter` gets its values one parameter at a time. One that is cut is built on the
    meta device and gets its memory afterwards: it never exists whole. A class that inherits this method from another
    may set values of its own elsewhere, so its models are built whole and then cut.

    Args:
        build: makes the plain model; the global generators must stand alike on all processes.
        place: from `choose_layout`.
        device: this process's device.
        prepare: changes the model in place before it is cut.
        gather_dtype: what blocks are gathered and computed in where they are cut; None: as they are stored.
        reshard_after_forward: whether a block's gathered weights are freed between forward and backward pass.
        timeout: how long a process waits for those with which it shares the model; None: PyTorch's default.

    Raises:
        UserError: the architecture cannot be cut into `place.tensor` parts.
    """
    with on_meta():
        model = build()
    deferred = "init_parameter" in vars(type(model))
    # Else adapters would draw their values twice where nothing is cut, and once where it is.
    with NothingDrawn() if deferred else nullcontext():
        if not deferred or not place.sharded:
            with device:
                model = build()
        prepare(model)
    if place.sharded:
        from cleangpt.training.sharding import cut

        mesh = place.mesh(device, timeout)
        cut(model, place, mesh, gather_dtype, reshard_after_forward)
        if place.tensor > 1:
            model.register_forward_hook(lambda module, inputs, logits: whole(logits))
    if deferred:
        if place.sharded:
            model.to_empty(device=device)
        _initialise(model, device)
    return model


@torch.no_grad()
def _initialise(model: nn.Module, device: torch.device) -> None:
    """Draws every parameter whole, one after the other, and keeps this process's part of it.

    A part of the model that has an `init_parameter` of its own, such as an adapter, draws its own.
    """
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        owner, _, own_name = name.rpartition(".")
        part: Any = model.get_submodule(owner)
        if hasattr(part, "init_parameter"):
            part.init_parameter(own_name, values)
        else:
            cast(Any, model).init_parameter(name, values)
        parameter.copy_(like(values, parameter))


def with_gradient_exchange(model: nn.Module, place: Layout, device: torch.device) -> nn.Module:
    """The model to call in training: behind DDP where it has copies that are not cut, else `model` itself."""
    if place.sharded or place.replicas == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def recompute(model: nn.Module, every: int | None) -> None:
    """Makes every so-many-th block of `model.blocks` compute its activations again in the backward pass.

    Memory for arithmetic (Chen et al. 2016, "Training deep nets with sublinear memory cost"): such a block keeps its
    input alone. Names and results stay the same, those of dropout included.
    """
    for block in list(getattr(model, "blocks", []))[::every] if every else []:
        block.forward = _again(block.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function and no `partial`: torch.compile leaves a block whose `forward` is one uncompiled, and says nothing."""

    def forward_and_again(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return forward_and_again


def without_sync(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch: gradients are exchanged between devices after the last one of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return cast("AbstractContextManager[Any]", model.no_sync())
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "set_requires_gradient_sync"):  # fully_shard gave it that
        inner.set_requires_gradient_sync(last)
    return nullcontext()


# Tensors, whole and cut ----------------------------------------------------------------------------------------------


def is_cut(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`. Loading that class takes half as long as PyTorch; nobody has, where none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tree: Any) -> Any:
    """A state dict with every sharded tensor put together again; all processes must call it together."""
    if is_cut(tree):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    return tree


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return cast(Tensor, tensor.to_local() if is_cut(tensor) else tensor)


def gather_to_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory on the processes that `keep` them, one at a time on a device; all must call it."""
    gathered = {}
    for name, tensor in tensors.items():
        put_together: Tensor = whole(tensor)
        if keep:
            gathered[name] = put_together.detach().cpu()
    return gathered


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor that every process has, cut and placed as `reference` is."""
    if not is_cut(reference):
        return tensor.to(reference.device)
    from cleangpt.training.sharding import cut_like

    return cut_like(tensor, reference)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads whole tensors into a model that may be sharded."""
    current = model.state_dict()
    placed = {name: like(tensor, current[name]) if name in current else tensor for name, tensor in weights.items()}
    model.load_state_dict(placed, strict=strict)
