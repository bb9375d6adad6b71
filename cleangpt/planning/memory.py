"""Bytes on one device at the peak of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cleangpt.distributed.layout import Layout
from cleangpt.planning.devices import ALLOCATOR_FACTOR
from cleangpt.planning.workload import Part, Workload

Blocks = Sequence[tuple[int, Part]]
"""How many blocks there are of each kind."""


@dataclass(frozen=True)
class StepConfig:
    """How a step is made, on each device."""

    micro_batches: int = 1
    """In a step. Where there are several and the model is cut, gradients wait whole for the last of them."""
    reshard_after_forward: bool = True
    """Whether gathered weights are freed between forward and backward pass."""
    logits_parts: int = 1
    """Into how many parts the logits are cut; the loss of CleanGPT takes them whole."""


@dataclass(frozen=True)
class Memory:
    """Where the bytes are."""

    weights: float
    """In fp32, of which the optimizer makes the update."""
    gradients: float
    """In fp32."""
    moments: float
    """The optimizer's two, in fp32."""
    gathered: float
    """Weights and gradients of the blocks at hand, put together from their parts."""
    activations: float
    """What the blocks keep for the backward pass."""
    logits: float
    """What the rest of the model keeps, copies of the logits in the loss, and gradients of activations."""
    allocator: float
    """Reserved, but not in use."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, entry.name) for entry in fields(self)))


def static_bytes(parameters: int, layout: Layout) -> float:
    """Weights, gradients and two moments on one device, all in fp32 and cut over those that share a copy.

    Args:
        parameters: in the whole model.
        layout: how the processes share it.
    """
    return 16 * parameters / (layout.shards * layout.tensor)


def kinds_of_blocks(workload: Workload, recompute_every: int | None) -> Blocks:
    """Blocks that keep their activations and those that compute them again, as `training.recompute_every` says."""
    again = len(range(0, workload.blocks, recompute_every)) if recompute_every else 0
    return [(workload.blocks - again, workload.block), (again, workload.recomputed())]


def device_memory(
    workload: Workload, blocks: Blocks, layout: Layout, pace: StepConfig, weight_bytes: int, trained: float = 1.0
) -> Memory:
    """Memory at the peak, on the device that needs the most.

    Args:
        workload: of one micro-batch.
        blocks: from `kinds_of_blocks`.
        layout: how the processes share the model.
        pace: how the step is made.
        weight_bytes: of a gathered weight; 2 in 16 bit, else 4.
        trained: share of the parameters that train, and so have gradients and moments.
    """
    state = static_bytes(workload.parameters, layout) / 4
    waiting = 4 * workload.parameters / layout.tensor if layout.shards > 1 and pace.micro_batches > 1 else 0.0
    kept = sum(count * _kept(part, workload, layout.tensor) for count, part in blocks)
    logits = (workload.rest.kept + workload.passing) / pace.logits_parts
    if any(count and part.again.operations for count, part in blocks):
        # A block that is computed again in the backward pass is whole for a while, when the logits are gone.
        logits = max(logits, _kept(workload.block, workload, layout.tensor))
    gathered = _gathered(workload, layout, weight_bytes, pace.reshard_after_forward) if layout.shards > 1 else 0.0
    gradients, moments = trained * (state + waiting), trained * 2 * state
    used = state + gradients + moments + gathered + kept + logits
    return Memory(state, gradients, moments, gathered, kept, logits, (ALLOCATOR_FACTOR - 1) * used)


def _kept(part: Part, workload: Workload, tensor: int) -> float:
    """What a block keeps: its share, and whole inputs where it gathers these and does not compute them again."""
    whole = 0.0 if part.again.operations else workload.gathered * (1 - 1 / tensor)
    return part.kept / tensor + whole


def _gathered(workload: Workload, layout: Layout, weight_bytes: int, reshard_after_forward: bool) -> float:
    """What fsdp puts together: the rest of the model from its forward to its backward pass, with its gradients; a block
    in use and the next one; the gradients of one block, and their copy in fp32 that is reduced."""
    rest = 2 * weight_bytes * workload.rest_parameters
    at_hand = 2 if reshard_after_forward else workload.blocks
    return (rest + ((at_hand + 1) * weight_bytes + 4) * workload.block_parameters) / layout.tensor
