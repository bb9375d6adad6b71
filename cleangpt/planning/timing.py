"""Seconds of one step: arithmetic and memory traffic, and the exchange between devices that they do not hide."""

from dataclasses import dataclass, replace

from cleangpt.distributed.layout import Layout
from cleangpt.planning.devices import ATTENTION_SHARE, BANDWIDTH_SHARE, LAUNCH, MATMUL_SHARE, Device, Group
from cleangpt.planning.memory import Blocks, StepConfig
from cleangpt.planning.workload import Work, Workload

FP8_BYTES = 5
"""Moved for each operand of an fp8 product: read for its largest value, read again, written in fp8."""
OPTIMIZER_BYTES = 40
"""Moved for each parameter: weight, gradient and moments read, weight and moments written, gradient clipped."""


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    """Forward and backward passes."""
    exposed: float
    """Exchange between devices that nothing hides."""
    optimizer: float
    """The update."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.exposed + self.optimizer


@dataclass(frozen=True)
class Machine:
    """What computes, and in which numbers."""

    device: Device
    precision: str
    """As `training.precision`, but not auto."""
    compiled: bool
    """Whether blocks are compiled. What is outside of them, mainly the loss, is not."""
    per_node: int
    """Devices in one machine."""

    @property
    def base(self) -> str:
        """The precision of what is not multiplied in fp8."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def weight_bytes(self) -> int:
        """Of a weight as it is gathered."""
        return 2 if self.base in ("bf16", "fp16") else 4

    def seconds(self, work: Work, block: bool) -> float:
        """Of work on this device alone; `block`: within a block."""
        compiled, fp8 = self.compiled and block, self.precision == "fp8" and block
        bandwidth = self.device.bandwidth * BANDWIDTH_SHARE
        peak = self.device.flops("fp8" if fp8 else self.base)
        # A product of small matrices takes as long as its operands and result take to come and go.
        products = max(work.matmul_flops / (peak * MATMUL_SHARE), work.fused / bandwidth)
        attention = work.attention_flops / (self.device.flops(self.base) * ATTENTION_SHARE)
        moved = (work.fused if compiled else work.moved) + FP8_BYTES * fp8 * work.operands
        launches = LAUNCH * (2 * work.products if compiled else work.operations)
        return max(products + attention + moved / bandwidth, launches)


def step_time(workload: Workload, blocks: Blocks, layout: Layout, pace: StepConfig, machine: Machine) -> StepTime:
    """The time of a step; the arguments are those of `memory.device_memory`."""
    cut = layout.tensor
    rest = workload.rest
    outside = machine.seconds(_cut(rest.forward + rest.backward, cut, pace.logits_parts), block=False)
    forward = [(count, machine.seconds(_share(part.forward, cut), True)) for count, part in blocks]
    backward = [(count, machine.seconds(_share(part.backward + part.again, cut), True)) for count, part in blocks]
    compute = outside + sum(count * seconds for count, seconds in forward + backward)
    within = _within_matrices(workload, blocks, layout, machine, whole_logits=pace.logits_parts == 1)
    # All micro-batches gather weights; the last one exchanges gradients too.
    first, last = (
        _around_blocks(workload, forward, backward, layout, machine, pace.reshard_after_forward, exchange)
        for exchange in (False, True)
    )
    optimizer = OPTIMIZER_BYTES * workload.parameters / (layout.shards * cut)
    return StepTime(
        compute=pace.micro_batches * compute,
        exposed=pace.micro_batches * within + (pace.micro_batches - 1) * first + last,
        optimizer=optimizer / (machine.device.bandwidth * BANDWIDTH_SHARE),
    )


def _share(work: Work, parts: int) -> Work:
    """A device's share of a block's work. Each of its kernels is smaller; there are as many of them."""
    return replace(work * (1 / parts), operations=work.operations, products=work.products)


def _cut(work: Work, parts: int, logits_parts: int) -> Work:
    """A device's share: of products, one of `parts`; of what is done with logits, one of `logits_parts`."""
    return Work(matmul_flops=work.matmul_flops / parts, moved=work.moved / logits_parts, operations=work.operations)


def _within_matrices(workload: Workload, blocks: Blocks, layout: Layout, machine: Machine, whole_logits: bool) -> float:
    """Exchange of activations between devices that share matrices, which wait for it."""
    rest = workload.rest.forward + workload.rest.backward if whole_logits else Work()
    work = sum((entry * count for count, entry in _passes(blocks)), rest)
    return Group(machine.device, layout.tensor, 1, machine.per_node).exchange(work.exchanged, work.exchanges)


def _passes(blocks: Blocks) -> list[tuple[int, Work]]:
    """Number and work of the blocks of each kind, over all passes."""
    return [(count, part.forward + part.backward + part.again) for count, part in blocks]


def _around_blocks(
    workload: Workload, forward: list[tuple[int, float]], backward: list[tuple[int, float]], layout: Layout,
    machine: Machine, reshard_after_forward: bool, exchange: bool,
) -> float:  # fmt: skip
    """Exchange of weights and gradients in a micro-batch, as far as the blocks' arithmetic does not hide it."""
    shards = Group(machine.device, layout.shards, layout.tensor, machine.per_node)
    copies = Group(machine.device, layout.replicas, layout.tensor * layout.shards, machine.per_node)

    def gather(parameters: int) -> float:
        return shards.exchange(parameters / layout.tensor * machine.weight_bytes)

    def reduce(parameters: int) -> float:
        if not exchange:
            return 0.0
        size = 4 * parameters / layout.tensor
        return shards.exchange(size) + 2 * copies.exchange(size / layout.shards)

    block, rest = workload.block_parameters, workload.rest_parameters
    if layout.shards == 1:
        hidden = sum(count * seconds for count, seconds in backward)
        return max(0.0, reduce(workload.parameters) - hidden) if layout.replicas > 1 else 0.0
    behind = gather(block) * reshard_after_forward + reduce(block)
    exposed = sum(count * max(0.0, gather(block) - seconds) for count, seconds in forward)
    exposed += sum(count * max(0.0, behind - seconds) for count, seconds in backward)
    # Nothing hides the first gathering, nor the last reduction.
    return exposed + gather(rest) + gather(block) + reduce(rest) + reduce(block)


def exchanged_bytes(workload: Workload, blocks: Blocks, layout: Layout, pace: StepConfig, machine: Machine) -> float:
    """Bytes that a device sends in a step, in rings: (n - 1) / n of a tensor to gather it, or to reduce and scatter."""
    parameters = workload.parameters / layout.tensor
    gathers = pace.micro_batches * (1 + pace.reshard_after_forward)
    weights = _ring(layout.shards) * parameters * (gathers * machine.weight_bytes + 4)
    copies = 2 * _ring(layout.replicas) * 4 * parameters / layout.shards
    activations = sum(count * work.exchanged for count, work in _passes([(1, workload.rest), *blocks]))
    return weights + copies + pace.micro_batches * _ring(layout.tensor) * activations


def _ring(devices: int) -> float:
    return (devices - 1) / devices
