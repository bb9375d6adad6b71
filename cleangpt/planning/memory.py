"""Memory on one device at the peak of a step, in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cleangpt.distributed.layout import Layout
from cleangpt.planning.communication import ALLOCATOR_FACTOR
from cleangpt.planning.workload import Passes, Workload

Blocks = Sequence[tuple[int, Passes]]
"""The number of blocks of each kind: those that save their activations and those that recompute them."""


@dataclass(frozen=True)
class StepConfig:
    """How each device computes a step."""

    micro_batches: int = 1
    """Per step. With several, a sharded model accumulates unsharded gradients until the last of them."""
    reshard_after_forward: bool = True
    """Whether gathered weights are freed between the forward and the backward pass."""
    logits_shards: int = 1
    """Devices that the logits are sharded over; CleanGPT's loss gathers them."""


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose."""

    weights: float
    """In fp32, as the optimizer updates them."""
    gradients: float
    """In fp32."""
    moments: float
    """The optimizer's two, in fp32."""
    gathered: float
    """Weights and gradients of the blocks in use, gathered from their shards."""
    activations: float
    """Saved by the blocks for the backward pass."""
    logits: float
    """Saved by the rest of the model, copies of the logits in the loss, and gradients of activations."""
    allocator: float
    """Reserved, but not in use."""
    reference: float = 0.0
    """Weights of a policy's frozen reference model, in fp32."""

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(vars(self)[entry.name] for entry in fields(self)))


def static_bytes(parameters: int, layout: Layout) -> float:
    """Weights, gradients and two moments on one device, in fp32.

    Args:
        parameters: in the whole model.
        layout: how the processes share it.
    """
    return 16 * parameters / (layout.shards * layout.tensor)


def kinds_of_blocks(workload: Workload, recompute_every: int | None, selective: bool = False) -> Blocks:
    """Blocks that save their activations and blocks that recompute them, by `training.recompute_every`; `selective` is
    `training.recompute`."""
    recomputed = len(range(0, workload.blocks, recompute_every)) if recompute_every else 0
    return [(workload.blocks - recomputed, workload.block), (recomputed, workload.recomputed_block(selective))]


def device_memory(
    workload: Workload, blocks: Blocks, layout: Layout, step: StepConfig, weight_bytes: int, trained: float = 1.0,
    referenced: bool = False,
) -> Memory:  # fmt: skip
    """Memory at the peak, on the device that needs the most.

    Args:
        workload: of one micro-batch.
        blocks: from `kinds_of_blocks`.
        layout: how the processes share the model.
        step: how the step is computed.
        weight_bytes: per gathered weight: 2 in 16 bit, else 4.
        trained: fraction of the parameters that train, and so have gradients and moments.
        referenced: whether there is a frozen copy of the model.
    """
    state = static_bytes(workload.parameters, layout) / 4
    accumulates = layout.shards > 1 and step.micro_batches > 1
    unsharded = 4 * workload.parameters / layout.tensor if accumulates else 0.0
    activations = sum(count * _saved_activations(passes, workload, layout.tensor) for count, passes in blocks)
    logits = (workload.rest.saved_activations + workload.transient) / step.logits_shards
    # Recomputing a block needs the memory of the activations that it did not save, when the logits have been freed.
    whole = _saved_activations(workload.block, workload, layout.tensor)
    recomputed = [passes for count, passes in blocks if count and passes.recomputed.kernels]
    logits = max([logits, *(whole - _saved_activations(passes, workload, layout.tensor) for passes in recomputed)])
    gathered = _gathered(workload, layout, weight_bytes, step.reshard_after_forward) if layout.shards > 1 else 0.0
    gradients, moments = trained * (state + unsharded), trained * 2 * state
    reference = referenced * state
    used = reference + state + gradients + moments + gathered + activations + logits
    return Memory(state, gradients, moments, gathered, activations, logits, (ALLOCATOR_FACTOR - 1) * used, reference)


def _saved_activations(passes: Passes, workload: Workload, tensor: int) -> float:
    """What a block saves: its shard, and full inputs where it gathers these and does not recompute them."""
    full_inputs = 0.0 if passes.recomputed.kernels else workload.gathered * (1 - 1 / tensor)
    return passes.saved_activations / tensor + full_inputs


def _gathered(workload: Workload, layout: Layout, weight_bytes: int, reshard_after_forward: bool) -> float:
    """What FSDP gathers: the rest of the model with its gradients, from its forward to its backward pass; the block in
    use and the next; the gradients of one block, and their fp32 copy that is reduced."""
    rest = 2 * weight_bytes * workload.rest_parameters
    in_use = 2 if reshard_after_forward else workload.blocks
    return (rest + ((in_use + 1) * weight_bytes + 4) * workload.block_parameters) / layout.tensor
