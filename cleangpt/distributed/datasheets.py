"""Specifications of GPUs and other devices, from their data sheets."""

import dataclasses
from dataclasses import dataclass

from cleangpt.errors import UserError, nearest

GIB = 2**30
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, in machines of several. 0 FLOP/s: the device does not support that precision."""

    name: str
    product: str = ""
    """Part of the name that the device itself reports; empty: none."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Memory bandwidth in bytes/s."""
    fp32: float
    """Dense FLOP/s in fp32, outside matrix units; the following are within them."""
    tf32: float = 0.0
    bf16: float = 0.0
    fp16: float = 0.0
    fp8: float = 0.0
    matmul_share: float = 0.50
    """Share of the peak FLOP/s that programs reach in large matrix products: 0.50 on an H100, and assumed where nothing
    was measured; an A100 comes closer to its peak. Both were set looking at rows of docs/planning.md."""
    attention_share: float = 0.35
    """Share of the peak 16-bit FLOP/s in fused attention: FlashAttention-2's on an H100 (Shah et al. 2024,
    "FlashAttention-3"), on an A100 0.60 (Dao 2023, "FlashAttention-2", section 4.1)."""
    link: float
    """Bandwidth to other devices of the machine, in bytes/s per direction."""
    hop: float = 3.4e-6
    """Latency of a ring step within the machine, in s; NCCL assumes 3.4 us for NVLink and 5.7 us for PCIe."""
    network: float = 50e9
    """Bandwidth to other machines, in bytes/s per direction and device; 50e9 is one 400 Gb/s adapter per device."""
    price: float
    """Dollars per hour: roughly what clouds charged on demand in 2025. An assumption; prices differ and change."""

    def flops(self, precision: str) -> float:
        """Peak dense FLOP/s of matrix products in a `training.precision` other than auto.

        Raises:
            UserError: the device does not support it.
        """
        by_precision: dict[str, float] = {name: vars(self)[name] for name in PRECISIONS}
        if not by_precision[precision]:
            allowed = ", ".join(name for name, flops in by_precision.items() if flops)
            raise UserError(f"training.precision is {precision!r}; allowed with --device {self.name}: auto, {allowed}")
        return by_precision[precision]

    @property
    def peak_flops(self) -> float:
        """Peak dense FLOP/s in 16 bit, or in fp32 where there are none; MFU is measured against it."""
        return self.bf16 or self.fp16 or self.fp32

    def precision(self, asked: str) -> str:
        """The meaning of `training.precision` here: auto is bf16 on a GPU that supports it, else fp32."""
        return asked if asked != "auto" else "bf16" if self.bf16 and self.name != "cpu" else "fp32"


def _hopper(
    name: str, product: str, memory: int, bandwidth: float, price: float, share: float = 1.0, matmul_share: float = 0.50
) -> Device:
    """An SXM H100 or H200; `share` is the fraction of its peak FLOP/s that its power limit allows."""
    return Device(
        name=name, product=product, memory=memory * GIB, bandwidth=bandwidth, fp32=67e12 * share, tf32=494.7e12 * share,
        bf16=989e12 * share, fp16=989e12 * share, fp8=1979e12 * share, link=450e9, matmul_share=matmul_share,
        price=price,
    )  # fmt: skip


_TABLE = [
    Device(
        name="b200", product="B200", memory=180 * GIB, bandwidth=7.7e12,
        fp32=75e12, tf32=1100e12, bf16=2250e12, fp16=2250e12,
        fp8=4500e12, link=900e9, price=5.0,
    ),
    _hopper("h200", "H200", 141, 4.8e12, 3.5, matmul_share=0.61),
    _hopper("h100", "H100", 80, 3.35e12, 3.0),
    _hopper("h100-500w", "H100", 96, 2.4e12, 2.5, share=(835 + 989) / 2 / 989),
    Device(
        name="a100", product="A100", memory=80 * GIB, bandwidth=2.039e12,
        fp32=19.5e12, tf32=156e12, bf16=312e12, fp16=312e12,
        link=300e9, network=25e9, matmul_share=0.70, attention_share=0.60, price=1.8,
    ),
    Device(
        name="a100-40gb", product="A100", memory=40 * GIB, bandwidth=1.555e12,
        fp32=19.5e12, tf32=156e12, bf16=312e12, fp16=312e12,
        link=300e9, network=12.5e9, matmul_share=0.70, attention_share=0.60, price=1.3,
    ),
    Device(
        name="l40s", product="L40S", memory=48 * GIB, bandwidth=864e9,
        fp32=91.6e12, tf32=183e12, bf16=362e12, fp16=362e12,
        fp8=733e12, link=32e9, hop=5.7e-6, network=6.25e9, price=1.0,
    ),
    Device(
        name="l4", product="L4", memory=24 * GIB, bandwidth=300e9,
        fp32=30.3e12, tf32=60e12, bf16=121e12, fp16=121e12,
        fp8=242e12, link=32e9, hop=5.7e-6, network=1.5625e9, price=0.7,
    ),
    Device(
        name="a10g", product="A10G", memory=24 * GIB, bandwidth=600e9,
        fp32=31.2e12, tf32=35e12, bf16=70e12, fp16=70e12,
        link=32e9, hop=5.7e-6, network=3.125e9, price=1.0,
    ),
    Device(
        name="4090", product="RTX 4090", memory=24 * GIB, bandwidth=1.008e12,
        fp32=82.6e12, tf32=82.6e12, bf16=165.2e12, fp16=165.2e12,
        fp8=330.3e12, link=32e9, hop=5.7e-6, network=1.25e9, price=0.6,
    ),
    Device(
        name="3090", product="RTX 3090", memory=24 * GIB, bandwidth=936e9,
        fp32=35.6e12, tf32=35.6e12, bf16=71e12, fp16=71e12,
        link=32e9, hop=5.7e-6, network=1.25e9, price=0.4,
    ),
    Device(
        name="v100", product="V100", memory=16 * GIB, bandwidth=900e9,
        fp32=15.7e12, fp16=125e12, link=150e9, network=1.5625e9,
        price=0.6,
    ),
    Device(
        name="t4", product="T4", memory=16 * GIB, bandwidth=320e9,
        fp32=8.1e12, fp16=65e12, link=16e9, hop=5.7e-6,
        network=1.5625e9, price=0.4,
    ),
    Device(
        name="cpu", memory=16 * GIB, bandwidth=50e9, fp32=0.75e12, bf16=0.75e12, link=10e9, hop=20e-6,
        network=0.125e9, price=0.1,
    ),
]  # fmt: skip
DEVICES = {device.name: device for device in _TABLE}
"""By the name that `cleangpt plan --device` takes. h100-500w is the one of the comparison in docs/planning.md: HBM2e, a
power limit of 500 W, and a peak midway between those of the H100 NVL (835e12) and SXM (989e12). The CPU has eight cores
with AVX2 at 3 GHz. For a V100, T4 or CPU, the links are PCIe, NVLink or host memory."""


def find_device(name: str, price: float | None = None) -> Device:
    """The device `name`, at another price if one is given.

    Raises:
        UserError: there is no such device, or the price is negative.
    """
    if name.lower() not in DEVICES:
        raise UserError(f"--device is {name!r}; allowed: {', '.join(DEVICES)}{nearest(name.lower(), DEVICES)}")
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price is {price}; allowed: dollars per device and hour, 0 or more")
    device = DEVICES[name.lower()]
    return device if price is None else dataclasses.replace(device, price=price)


def identify_device(reported: str) -> Device | None:
    """The device with the name that its driver reports, such as "NVIDIA A100-SXM4-80GB"; None: not in the table."""
    found = [device for device in _TABLE if device.product and device.product in reported]
    return max(found, key=lambda device: len(device.product), default=None)
