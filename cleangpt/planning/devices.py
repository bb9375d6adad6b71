"""Devices by their makers' data sheets, and the few shares of those figures that programs reach."""

import dataclasses
from dataclasses import dataclass

from cleangpt.errors import UserError, nearest

GIB = 2**30

MATMUL_SHARE = 0.50
"""Of the peak FLOP/s, in products of large matrices. Set once, between the compiled rows of docs/planning.md."""
ATTENTION_SHARE = 0.35
"""Of the peak 16-bit FLOP/s, in fused attention: FlashAttention-2 on an H100 (Shah et al. 2024, "FlashAttention-3")."""
BANDWIDTH_SHARE = 0.80
"""Of the bandwidth of memory and links, in large transfers."""
LAUNCH = 5e-6
"""Seconds that PyTorch takes to start one kernel; a small model waits for these, not for the device."""
ALLOCATOR_FACTOR = 1.10
"""Memory reserved by PyTorch's allocator, over memory in tensors at the peak."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, in machines of several. Zero FLOP/s: it has no units for that precision."""

    name: str
    memory: int
    """Bytes."""
    bandwidth: float
    """Of its memory, in bytes/s."""
    fp32: float
    """Dense FLOP/s in fp32, outside matrix units; the others are within them."""
    tf32: float = 0.0
    bf16: float = 0.0
    fp16: float = 0.0
    fp8: float = 0.0
    link: float
    """To the other devices of the machine, in bytes/s and direction."""
    hop: float = 3.4e-6
    """Latency of a step of a ring within the machine, in s; NCCL reckons 3.4 us for NVLink, 5.7 us for PCIe."""
    network: float = 50e9
    """To other machines, in bytes/s, direction and device; 50e9 is one 400 Gb/s adapter for each."""
    price: float
    """Dollars per hour: about what clouds asked on demand in 2025. An assumption; prices differ and change."""

    def flops(self, precision: str) -> float:
        """Peak dense FLOP/s of matrix products in a `training.precision` other than auto.

        Raises:
            UserError: the device has no units for it.
        """
        peak: float = getattr(self, precision)
        if not peak:
            allowed = ", ".join(name for name in PRECISIONS if getattr(self, name))
            raise UserError(f"training.precision is {precision!r}; allowed with --device {self.name}: auto, {allowed}")
        return peak

    def precision(self, asked: str) -> str:
        """What `training.precision` means here: auto is bf16 on a GPU that has it, else fp32."""
        return asked if asked != "auto" else "bf16" if self.bf16 and self.name != "cpu" else "fp32"


PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
NETWORK = 14e-6
"""Latency of a step of a ring between machines, in s, as NCCL reckons it."""


def _hopper(name: str, memory: int, bandwidth: float, price: float, share: float = 1.0) -> Device:
    """An SXM H100 or H200; `share` is that of its peak FLOP/s which its power limit allows."""
    return Device(
        name=name, memory=memory * GIB, bandwidth=bandwidth, fp32=67e12 * share, tf32=494.7e12 * share,
        bf16=989e12 * share, fp16=989e12 * share, fp8=1979e12 * share, link=450e9, price=price,
    )  # fmt: skip


_TABLE = [
    Device(
        name="b200", memory=180 * GIB, bandwidth=7.7e12, fp32=75e12, tf32=1100e12, bf16=2250e12, fp16=2250e12,
        fp8=4500e12, link=900e9, price=5.0,
    ),
    _hopper("h200", 141, 4.8e12, 3.5),
    _hopper("h100", 80, 3.35e12, 3.0),
    _hopper("h100-500w", 96, 2.4e12, 2.5, share=(835 + 989) / 2 / 989),
    Device(
        name="a100", memory=80 * GIB, bandwidth=2.039e12, fp32=19.5e12, tf32=156e12, bf16=312e12, fp16=312e12,
        link=300e9, network=25e9, price=1.8,
    ),
    Device(
        name="a100-40gb", memory=40 * GIB, bandwidth=1.555e12, fp32=19.5e12, tf32=156e12, bf16=312e12, fp16=312e12,
        link=300e9, network=12.5e9, price=1.3,
    ),
    Device(
        name="l40s", memory=48 * GIB, bandwidth=864e9, fp32=91.6e12, tf32=183e12, bf16=362e12, fp16=362e12,
        fp8=733e12, link=32e9, hop=5.7e-6, network=6.25e9, price=1.0,
    ),
    Device(
        name="l4", memory=24 * GIB, bandwidth=300e9, fp32=30.3e12, tf32=60e12, bf16=121e12, fp16=121e12,
        fp8=242e12, link=32e9, hop=5.7e-6, network=1.5625e9, price=0.7,
    ),
    Device(
        name="4090", memory=24 * GIB, bandwidth=1.008e12, fp32=82.6e12, tf32=82.6e12, bf16=165.2e12, fp16=165.2e12,
        fp8=330.3e12, link=32e9, hop=5.7e-6, network=1.25e9, price=0.6,
    ),
    Device(
        name="3090", memory=24 * GIB, bandwidth=936e9, fp32=35.6e12, tf32=35.6e12, bf16=71e12, fp16=71e12,
        link=32e9, hop=5.7e-6, network=1.25e9, price=0.4,
    ),
    Device(
        name="v100", memory=16 * GIB, bandwidth=900e9, fp32=15.7e12, fp16=125e12, link=150e9, network=1.5625e9,
        price=0.6,
    ),
    Device(
        name="t4", memory=16 * GIB, bandwidth=320e9, fp32=8.1e12, fp16=65e12, link=16e9, hop=5.7e-6,
        network=1.5625e9, price=0.4,
    ),
    Device(
        name="cpu", memory=16 * GIB, bandwidth=50e9, fp32=0.75e12, bf16=0.75e12, link=10e9, hop=20e-6,
        network=0.125e9, price=0.1,
    ),
]  # fmt: skip
DEVICES = {device.name: device for device in _TABLE}
"""By the name that `--device` takes. h100-500w is the one of the comparison in docs/planning.md: HBM2e, a power limit
of 500 W, and a peak between those of the H100 NVL (835e12) and SXM (989e12), taken in the middle. The CPU is one of
eight cores with AVX2 at 3 GHz. For a V100, T4 or CPU the links are PCIe, NVLink or the host's own memory."""


def find_device(name: str, price: float | None = None) -> Device:
    """The device of a name, at another price where one is given.

    Raises:
        UserError: there is none of that name in the table, or the price is less than 0.
    """
    if name.lower() not in DEVICES:
        raise UserError(f"--device is {name!r}; allowed: {', '.join(DEVICES)}{nearest(name.lower(), DEVICES)}")
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price is {price}; allowed: dollars per device and hour, 0 or more")
    device = DEVICES[name.lower()]
    return device if price is None else dataclasses.replace(device, price=price)


@dataclass(frozen=True)
class Group:
    """Devices that exchange tensors along a ring: `size` of them, each `stride` from the next, `per_node` a machine."""

    device: Device
    size: int
    stride: int
    per_node: int

    def exchange(self, size: float, times: float = 1.0) -> float:
        """Seconds to gather `size` bytes from all, or to reduce and scatter as many; half of an all-reduce.

        `times` is over how many such exchanges they are spread, each of which has its latency.

        A ring sends (n - 1) / n of them in n - 1 steps (Thakur et al. 2005, section 4). Across machines, a group has
        the network adapters of those of its devices that share a machine.
        """
        if self.size == 1:
            return 0.0
        together = max(1, min(self.size, self.per_node // self.stride))
        nodes = -(-self.size // together)
        network = self.device.network * together if nodes > 1 else self.device.link
        within = self.device.link if together > 1 else network
        rate = min(network, within) * BANDWIDTH_SHARE
        between = nodes - 1
        latency = between * NETWORK + (self.size - 1 - between) * self.device.hop
        return size * (self.size - 1) / self.size / rate + times * latency
