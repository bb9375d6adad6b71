"""Time that devices take to communicate, and how close programs come to the data sheets of any device."""

from dataclasses import dataclass

from cleangpt.distributed.datasheets import Device

BANDWIDTH_SHARE = 0.80
"""Of the bandwidth of memory and links, in large transfers."""
LAUNCH_SECONDS = 5e-6
"""PyTorch's time to launch a kernel; small models wait for launches, not for the device."""
ALLOCATOR_FACTOR = 1.10
"""Memory reserved by PyTorch's allocator, over memory in tensors at the peak."""
NETWORK_HOP = 14e-6
"""Latency of a ring step between machines, in s, as NCCL assumes."""


@dataclass(frozen=True)
class ProcessGroup:
    """`size` devices in a ring, each `stride` ranks from the next, with `per_node` devices in a machine."""

    device: Device
    size: int
    stride: int
    per_node: int

    def seconds(self, size: float, collectives: float = 1.0) -> float:
        """Seconds to all-gather or reduce-scatter `size` bytes; an all-reduce takes twice that.

        A ring sends (n - 1) / n of the bytes in n - 1 steps (Thakur et al. 2005, section 4). Across machines, a group
        uses the network adapters of all its devices in a machine.

        Args:
            size: bytes, in total.
            collectives: over how many collectives they are spread, each with its latency.
        """
        if self.size == 1:
            return 0.0
        together = max(1, min(self.size, self.per_node // self.stride))
        nodes = -(-self.size // together)
        network = self.device.network * together if nodes > 1 else self.device.link
        within = self.device.link if together > 1 else network
        rate = min(network, within) * BANDWIDTH_SHARE
        between = nodes - 1
        latency = between * NETWORK_HOP + (self.size - 1 - between) * self.device.hop
        return size * (self.size - 1) / self.size / rate + collectives * latency
