"""Parallelism, applied from outside the model (design rule 7).

ddp   every device has a full replica of the model; gradients are all-reduced (Li et al. 2020, "PyTorch Distributed")
fsdp  weights, gradients and moments are sharded over the devices; blocks are all-gathered while they are used
      (Zhao et al. 2023, "PyTorch FSDP"; PyTorch's `fully_shard`)
hsdp  fsdp within groups of devices, replicated across the groups
tp    tensor parallelism: every matrix is sharded, and so is its product (Shoeybi et al. 2019, "Megatron-LM"); between
      the matrices, activations are sharded along the sequence (Korthikanti et al. 2022, "Reducing activation
      recomputation in large transformer models")

With `parallel.tensor`, fsdp or hsdp is combined with tensor parallelism over neighbouring devices. Whatever the
strategy, everything a run saves has the model's own tensor names and full shapes, so that it can be resumed under
another strategy and on another number of devices.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cleangpt.distributed.layout import Layout
from cleangpt.distributed.tensors import distribute_like, full_tensor
from cleangpt.models.base import LanguageModel
from cleangpt.models.meta import SkipInit, on_meta


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
    """Builds the model, with this rank's shard of it on `device`; initial weights do not depend on the layout.

    A model whose class sets `deferred_init` is initialised one parameter at a time; if it is sharded, it is built on
    the meta device and allocated afterwards, so the full model is never in memory. A subclass that does not set it
    itself may initialise parameters elsewhere, so its models are built in full and then sharded.

    Args:
        build: makes the plain model; the global random generators must be in the same state on all ranks.
        layout: from `choose_layout`.
        device: this rank's device.
        prepare: changes the model in place before it is sharded.
        gather_dtype: dtype in which sharded blocks are all-gathered and computed; None: that of the parameters.
        reshard_after_forward: whether a block's gathered weights are freed between forward and backward pass.
        timeout: limit for the collectives of the device mesh; None: PyTorch's default.

    Raises:
        UserError: the architecture does not support tensor parallelism over `layout.tensor` ranks.
    """
    with on_meta():
        model = build()
    deferred = vars(type(model)).get("deferred_init", False)
    # Otherwise adapters would be initialised twice when nothing is sharded, and once when it is.
    with SkipInit() if deferred else nullcontext():
        if not deferred or not layout.sharded:
            with device:
                model = build()
        prepare(model)
    if layout.sharded:
        from cleangpt.distributed.sharding import shard_model

        mesh = layout.mesh(device, timeout)
        shard_model(model, layout, mesh, gather_dtype, reshard_after_forward)
        if layout.tensor > 1:
            model.gather_logits = full_tensor
    if deferred:
        if layout.sharded:
            model.to_empty(device=device)
        _init_parameters(model, device)
    return model


@torch.no_grad()
def _init_parameters(model: LanguageModel, device: torch.device) -> None:
    """Initialises parameters one at a time: draws the full tensor on every rank, and keeps this rank's shard.

    A submodule with an `init_parameter` of its own, such as an adapter, initialises its parameters itself.
    """
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        owner, _, own_name = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if hasattr(module, "init_parameter"):
            module.init_parameter(own_name, values)
        else:
            cast(Any, model).init_parameter(name, values)
        parameter.copy_(distribute_like(values, parameter))


def wrap_ddp(model: LanguageModel, layout: Layout, device: torch.device) -> LanguageModel:
    """The module to call in training: wrapped in DDP if the layout only replicates, else `model` itself."""
    if layout.sharded or layout.replicas == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    wrapped: Any = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return cast(LanguageModel, wrapped)


def apply_activation_checkpointing(model: LanguageModel, every: int | None, selective: bool = False) -> None:
    """Checkpoints activations of every `every`-th block: only its input is kept, the rest recomputed in backward.

    Chen et al. 2016, "Training deep nets with sublinear memory cost". With `selective`, the results of matrix products
    and of attention are kept as well, so that nothing expensive is computed twice. Results do not change, dropout
    included. The block's `forward` is replaced rather than wrapped in a module, which would rename its parameters.
    """
    for block in list(model.layers())[::every] if every else []:
        block.forward = _checkpointed(block.forward, selective)


def _checkpointed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    """A function, not a `partial`: torch.compile silently skips a block whose `forward` is a partial.

    Two, since the compiler refuses a `context_fn` that does nothing.
    """
    contexts = partial(create_selective_checkpoint_contexts, keep_products)

    def checkpointed(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    def selectively(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)

    return selectively if selective else checkpointed


PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}  # fmt: skip
"""PyTorch's matrix products and fused attention; FlexAttention is recomputed."""


def keep_products(context: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps the results of PRODUCTS, but not those of attention with dropout: the recomputation draws every random
    number again, and would draw others for what comes after it."""
    if getattr(operation, "overloadpacket", None) not in PRODUCTS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    names = [argument.name for argument in operation._schema.arguments]
    random = (dict(zip(names, args, strict=False)) | kwargs).get("dropout_p", 0.0) > 0
    return CheckpointPolicy.PREFER_RECOMPUTE if random else CheckpointPolicy.MUST_SAVE


def gradient_sync(model: LanguageModel, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch: gradients are reduced between ranks only after the last one of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return cast("AbstractContextManager[Any]", model.no_sync())
    inner: Any = getattr(model, "_orig_mod", model)  # the module that torch.compile wraps
    if hasattr(inner, "set_requires_gradient_sync"):  # an FSDPModule; importing that class is slow, see tensors.py
        inner.set_requires_gradient_sync(last)
    return nullcontext()
