"""Seconds per step: arithmetic, memory traffic, and the communication that they do not hide."""

from dataclasses import dataclass, replace

from cleangpt.distributed.datasheets import Device
from cleangpt.distributed.layout import Layout
from cleangpt.planning.communication import BANDWIDTH_SHARE, LAUNCH_SECONDS, ProcessGroup
from cleangpt.planning.memory import Blocks, StepConfig
from cleangpt.planning.workload import Work, Workload

FP8_BYTES = 5
"""Moved per operand of an fp8 product: read for its maximum, read again, written in fp8."""
OPTIMIZER_BYTES = 40
"""Moved per parameter: weight, gradient and moments read, weight and moments written, gradient clipped."""


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    """Forward and backward passes."""
    exposed: float
    """Communication that no computation hides."""
    optimizer: float
    """The optimizer's update."""
    sampling: float = 0.0
    """A policy's answers."""
    looking_back: float = 0.0
    """Passes over these answers without gradient."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.compute + self.exposed + self.optimizer + self.sampling + self.looking_back


@dataclass(frozen=True)
class Machine:
    """What computes, and in which precision."""

    device: Device
    precision: str
    """A `training.precision` other than auto."""
    compiled: bool
    """Whether blocks are compiled; the rest, mainly the loss, is not."""
    per_node: int
    """Devices per machine."""

    @property
    def base(self) -> str:
        """The precision of everything not multiplied in fp8."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def weight_bytes(self) -> int:
        """Bytes of a gathered weight."""
        return 2 if self.base in ("bf16", "fp16") else 4

    def seconds(self, work: Work, block: bool) -> float:
        """Seconds that work takes on this device alone, within a block or outside."""
        compiled, fp8 = self.compiled and block, self.precision == "fp8" and block
        bandwidth = self.device.bandwidth * BANDWIDTH_SHARE
        peak = self.device.flops("fp8" if fp8 else self.base)
        # Small matrix products are limited by reading operands and writing results.
        products = max(work.matmul_flops / (peak * self.device.matmul_share), work.fused_bytes / bandwidth)
        attention = work.attention_flops / (self.device.flops(self.base) * self.device.attention_share)
        moved = (work.fused_bytes if compiled else work.bytes) + FP8_BYTES * fp8 * work.operands
        launches = LAUNCH_SECONDS * (2 * work.products if compiled else work.kernels)
        return max(products + attention + moved / bandwidth, launches)


def step_time(workload: Workload, blocks: Blocks, layout: Layout, step: StepConfig, machine: Machine) -> StepTime:
    """The time of a step; for the arguments, see `memory.device_memory`."""
    rest = workload.rest
    outside = machine.seconds(_rest_share(rest.forward + rest.backward, layout.tensor, step.logits_shards), block=False)
    forward = [(count, machine.seconds(_block_share(passes.forward, layout.tensor), True)) for count, passes in blocks]
    backward = [
        (count, machine.seconds(_block_share(passes.backward + passes.recomputed, layout.tensor), True))
        for count, passes in blocks
    ]
    compute = outside + sum(count * seconds for count, seconds in forward + backward)
    tensor_parallel = _tensor_parallel(workload, blocks, layout, machine, gather_logits=step.logits_shards == 1)
    # All micro-batches gather weights; the last one reduces gradients too.
    first, last = (
        _data_parallel(workload, forward, backward, layout, machine, step.reshard_after_forward, reduces)
        for reduces in (False, True)
    )
    optimizer = OPTIMIZER_BYTES * workload.parameters / (layout.shards * layout.tensor)
    return StepTime(
        compute=step.micro_batches * compute,
        exposed=step.micro_batches * tensor_parallel + (step.micro_batches - 1) * first + last,
        optimizer=optimizer / (machine.device.bandwidth * BANDWIDTH_SHARE),
    )


def _block_share(work: Work, shards: int) -> Work:
    """A device's share of a block's work: smaller kernels, but as many of them."""
    return replace(work * (1 / shards), kernels=work.kernels, products=work.products)


def _rest_share(work: Work, shards: int, logits_shards: int) -> Work:
    """A device's share of the rest's work: one of `shards` of products, one of `logits_shards` of other operations."""
    return Work(matmul_flops=work.matmul_flops / shards, bytes=work.bytes / logits_shards, kernels=work.kernels)


def _tensor_parallel(
    workload: Workload, blocks: Blocks, layout: Layout, machine: Machine, gather_logits: bool
) -> float:
    """Seconds that tensor parallelism waits for activations of other devices."""
    rest = workload.rest.forward + workload.rest.backward if gather_logits else Work()
    work = sum((entry * count for count, entry in _all_passes(blocks)), rest)
    group = ProcessGroup(machine.device, layout.tensor, 1, machine.per_node)
    return group.seconds(work.communication, work.collectives)


def _all_passes(blocks: Blocks) -> list[tuple[int, Work]]:
    """Number and total work of the blocks of each kind."""
    return [(count, passes.forward + passes.backward + passes.recomputed) for count, passes in blocks]


def _data_parallel(
    workload: Workload, forward: list[tuple[int, float]], backward: list[tuple[int, float]], layout: Layout,
    machine: Machine, reshard_after_forward: bool, reduces: bool,
) -> float:  # fmt: skip
    """Seconds that a micro-batch waits for weights, and if it `reduces`, for gradients: what the blocks' arithmetic
    does not hide."""
    shards = ProcessGroup(machine.device, layout.shards, layout.tensor, machine.per_node)
    replicas = ProcessGroup(machine.device, layout.replicas, layout.tensor * layout.shards, machine.per_node)

    def gather(parameters: int) -> float:
        return shards.seconds(parameters / layout.tensor * machine.weight_bytes)

    def reduce(parameters: int) -> float:
        if not reduces:
            return 0.0
        size = 4 * parameters / layout.tensor
        return shards.seconds(size) + 2 * replicas.seconds(size / layout.shards)

    block, rest = workload.block_parameters, workload.rest_parameters
    if layout.shards == 1:
        hidden = sum(count * seconds for count, seconds in backward)
        return max(0.0, reduce(workload.parameters) - hidden) if layout.replicas > 1 else 0.0
    behind = gather(block) * reshard_after_forward + reduce(block)
    exposed = sum(count * max(0.0, gather(block) - seconds) for count, seconds in forward)
    exposed += sum(count * max(0.0, behind - seconds) for count, seconds in backward)
    # Nothing hides the first all-gather and the last reduce-scatter.
    return exposed + gather(rest) + gather(block) + reduce(rest) + reduce(block)


def sent_bytes(workload: Workload, blocks: Blocks, layout: Layout, step: StepConfig, machine: Machine) -> float:
    """Bytes that a device sends per step, in rings: (n - 1) / n of a tensor per all-gather or reduce-scatter."""
    parameters = workload.parameters / layout.tensor
    gathers = step.micro_batches * (1 + step.reshard_after_forward)
    weights = _ring(layout.shards) * parameters * (gathers * machine.weight_bytes + 4)
    copies = 2 * _ring(layout.replicas) * 4 * parameters / layout.shards
    activations = sum(count * work.communication for count, work in _all_passes([(1, workload.rest), *blocks]))
    return weights + copies + step.micro_batches * _ring(layout.tensor) * activations


def _ring(devices: int) -> float:
    return (devices - 1) / devices
