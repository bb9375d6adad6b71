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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cleangpt.distributed.layout import Layout
from cleangpt.distributed.tensors import distribute_like, full_tensor
from cleangpt.models.base import LanguageModel, SkipInit, on_meta


# From a plain model to one spread over devices ------------------------------------------------------------------------
def parallelize(
    build: Callable[[], LanguageModel],
    layout: Layout,
    device: torch.device,
    prepare: Callable[[LanguageModel], None] = lambda model: None,
    *,
    gather_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    timeout: timedelta | None = None,
) -> LanguageModel:
    """The model, with this process's part of its parameters on `device`, holding the same values whatever the layout.

    A model whose class has an `init_parameter` gets its values one parameter at a time. One that is cut is built on the
    meta device and gets its memory afterwards: it never exists whole. A class that inherits this method from another
    may set values of its own elsewhere, so its models are built whole and then cut.

    Args:
        build: makes the plain model; the global generators must stand alike on all processes.
        layout: from `choose_layout`.
        device: this process's device.
        prepare: changes the model in layout before it is cut.
        gather_dtype: what blocks are gathered and computed in where they are cut; None: as they are stored.
        reshard_after_forward: whether a block's gathered weights are freed between forward and backward pass.
        timeout: how long a process waits for those with which it shares the model; None: PyTorch's default.

    Raises:
        UserError: the architecture cannot be cut into `layout.tensor` parts.
    """
    with on_meta():
        model = build()
    deferred = vars(type(model)).get("deferred_init", False)
    # Else adapters would draw their values twice where nothing is cut, and once where it is.
    with SkipInit() if deferred else nullcontext():
        if not deferred or not layout.sharded:
            with device:
                model = build()
        prepare(model)
    if layout.sharded:
        from cleangpt.distributed.sharding import cut

        mesh = layout.mesh(device, timeout)
        cut(model, layout, mesh, gather_dtype, reshard_after_forward)
        if layout.tensor > 1:
            model.gather_logits = full_tensor
    if deferred:
        if layout.sharded:
            model.to_empty(device=device)
        _initialise(model, device)
    return model


@torch.no_grad()
def _initialise(model: LanguageModel, device: torch.device) -> None:
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
        parameter.copy_(distribute_like(values, parameter))


def wrap_ddp(model: LanguageModel, layout: Layout, device: torch.device) -> LanguageModel:
    """The model to call in training: behind DDP where it has copies that are not cut, else `model` itself."""
    if layout.sharded or layout.replicas == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    wrapped: Any = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return cast(LanguageModel, wrapped)


def apply_activation_checkpointing(model: LanguageModel, every: int | None) -> None:
    """Makes every so-many-th block of `model.blocks` compute its activations again in the backward pass.

    Memory for arithmetic (Chen et al. 2016, "Training deep nets with sublinear memory cost"): such a block keeps its
    input alone. Names and results stay the same, those of dropout included.
    """
    for block in list(model.layers())[::every] if every else []:
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function and no `partial`: torch.compile leaves a block whose `forward` is one uncompiled, and says nothing."""

    def forward_and_again(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return forward_and_again


def gradient_sync(model: LanguageModel, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch: gradients are exchanged between devices after the last one of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return cast("AbstractContextManager[Any]", model.no_sync())
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "set_requires_gradient_sync"):  # fully_shard gave it that
        inner.set_requires_gradient_sync(last)
    return nullcontext()
