"""Where and in which numbers a model computes: device, precision, compilation; applied from outside the model."""

import contextlib
import ctypes
import importlib.util
import os
import random
import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from cleangpt.config import Device
from cleangpt.errors import UserError, require
from cleangpt.models.base import LanguageModel
from cleangpt.validation import describe, fits

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense 16-bit matrix FLOP/s by a part of the device's name, from the makers' data sheets."""


MALLOC_SETTINGS = {-4: 0, -1: 2**31 - 1}
"""Of `malloc.h`: M_MMAP_MAX, allocations apart from the heap; M_TRIM_THRESHOLD, bytes free at its end that it keeps."""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a `training.device` means, for the process `local_rank` of this machine.

    Raises:
        UserError: there is no device of that name, or this machine has none.
    """
    if not fits(name, Device):
        raise UserError(f"device is {name!r}; allowed: {describe(Device)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device("cuda", local_rank) if name == "cuda" and local_rank else torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if name == "cuda" and 0 < count <= local_rank:
        raise UserError(f"this machine has {count} cuda devices, and a process needs its own; start {count} processes")
    if (device.index or 0) >= count:
        raise UserError(f"training.device is {name!r}, but this machine has {count} {device.type} devices; try auto")
    return device


def choose_precision(device: torch.device, precision: str) -> str:
    """`training.precision`, where auto becomes bf16 on a CUDA device that computes in it, else fp32."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What `training.precision` multiplies matrices in; fp8 stands on bf16, and tf32 is a way to multiply fp32."""
    precision = choose_precision(device, precision)
    return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context of a forward pass that multiplies in `dtype`; nothing for fp32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def set_fp32_precision(precision: str) -> None:
    """How matrices of fp32 are multiplied: exactly with fp32, else in TF32 where a device has it."""
    exact = precision == "fp32"
    if hasattr(torch.backends, "fp32_precision"):
        # What a library has set for matrices alone would count for more than the setting for all operations.
        backends = cast(Any, torch.backends)
        for settings in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
            settings.fp32_precision = "ieee" if exact else "tf32"
    else:
        torch.set_float32_matmul_precision("highest" if exact else "high")


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a precision that the device has no units for, or whose library is missing.

    Raises:
        UserError: one line naming what is missing.
    """
    if precision != "fp8":
        return
    require("torchao", "fp8")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"training.precision is 'fp8', but {describe_device(device)} has no fp8 units; "
            "allowed: GPUs of compute capability 8.9 or more, such as H100; try bf16"
        )


def use_fp8(model: LanguageModel, emulate: bool = False) -> None:
    """Makes the linear layers of the blocks multiply in fp8.

    Micikevicius et al. 2022, "FP8 formats for deep learning"; torchao scales every tensor as it comes. Layers
    with a side that 16 does not divide stay as they are: the units cannot take them. Weights and their names do not
    change; `emulate` computes the same without such units.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0

    for block in model.layers():
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: Triton for CUDA, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))


def compile_blocks(model: LanguageModel) -> None:
    """Puts torch.compile into each element of `model.blocks`; they share what is compiled. Names do not change."""
    for block in model.layers():
        block.compile()


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled modules run as plain ones, for inputs whose shape changes with every call."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to ask would load the compiler
        return contextlib.nullcontext()
    return cast("AbstractContextManager[Any]", torch.compiler.set_stance("force_eager"))


def peak_flops(device: torch.device) -> float | None:
    """The device's peak 16-bit matrix FLOP/s, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory for this process: the device's with CUDA, its share of the machine's on a CPU; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps" or not hasattr(os, "sysconf"):
        return None
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: of the device's memory with CUDA, else of the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def keep_freed_memory(device: torch.device) -> None:
    """Where a CPU computes: what a step frees stays with the process for the next one.

    The C library would else give every large tensor back, and the system fill it with zeros again page by page, which
    takes a tenth of a step whose tensors are larger than 32 MiB. Only glibc, of Linux, does so and can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt is not None:
        for parameter, value in MALLOC_SETTINGS.items():
            mallopt(parameter, value)


def seed_everything(seed: int) -> None:
    """Seeds the generators of PyTorch (all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class RandomState:
    """The random generators of PyTorch (host and device), NumPy and Python, as something to save."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Where every generator stands."""
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
            "python": random.getstate(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts every generator where it stood; one of a device that is not in use here is left alone."""
        torch.set_rng_state(state["torch"])
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal), gauss_next))
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if self.device.type == "mps" and "mps" in state:
            torch.mps.set_rng_state(state["mps"])


def describe_device(device: torch.device) -> str:
    """The device in a few words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)" if device.type == "cpu" else "mps"
