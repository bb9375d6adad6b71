"""Device, precision, compilation and random state; applied from outside the model."""

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
from torch import Tensor, nn

from cleangpt.distributed.datasheets import identify_device
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError, require
from cleangpt.models.base import LanguageModel
from cleangpt.validation import Device, describe, fits

MALLOC_SETTINGS = {-4: 0, -1: 2**31 - 1}
"""From `malloc.h`: M_MMAP_MAX, mappings outside the heap; M_TRIM_THRESHOLD, free bytes kept at the top of the heap."""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `training.device`, in the process `local_rank` of this machine.

    Raises:
        UserError: the name is not a device, or this machine does not have it.
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
    """`training.precision`, with auto resolved: bf16 on a CUDA device that supports it, else fp32."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The autocast dtype of `training.precision`: bf16 for fp8; fp32 for tf32, which only changes its products."""
    precision = choose_precision(device, precision)
    return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context of a forward pass with matrix products in `dtype`; does nothing for fp32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def set_fp32_precision(precision: str) -> None:
    """Sets the precision of fp32 matrix products: IEEE for fp32, else TF32 where the device has it.

    Not by `torch.backends.cuda.matmul.fp32_precision`, after which PyTorch 2.9 to 2.13 refuse to read the older
    settings, as their compiler does for CUDA devices. The function used here sets both.
    """
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a precision that the device does not support, or whose library is missing.

    Raises:
        UserError: one line naming what is missing.
    """
    if precision != "fp8":
        return
    require("torchao")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"training.precision is 'fp8', but {describe_device(device)} has no fp8 units; "
            "allowed: GPUs of compute capability 8.9 or more, such as H100; try bf16"
        )


def use_fp8(model: LanguageModel, emulate: bool = False) -> None:
    """Converts the linear layers of the blocks to fp8 products.

    Micikevicius et al. 2022, "FP8 formats for deep learning"; torchao scales each tensor dynamically. Layers
    with a dimension that is not a multiple of 16 are left alone, since the hardware does not support them. Weights and
    their names do not change; `emulate` computes the same on devices without fp8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0

    for block in model.layers():
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has its backend: Triton for CUDA, a C++ compiler for CPUs."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))


def compile_blocks(model: LanguageModel) -> None:
    """Compiles each block of the model, in place; they share the compiled code, and parameters keep their names."""
    for block in model.layers():
        block.compile()


def uncompiled(compiled: str) -> AbstractContextManager[Any]:
    """A context in which modules run eagerly, for inputs whose shape changes with every call.

    Args:
        compiled: `training.compile`; with off there is nothing to do, and the compiler is not loaded.
    """
    if compiled == "off":
        return contextlib.nullcontext()
    return cast("AbstractContextManager[Any]", torch.compiler.set_stance("force_eager"))


def peak_flops(device: torch.device) -> float | None:
    """The device's peak dense 16-bit FLOP/s; None: unknown."""
    known = identify_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.peak_flops if known else None


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory for this process: the GPU's, or its share of the machine's on CPUs; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps" or not hasattr(os, "sysconf"):
        return None
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes allocated so far: of the GPU's memory with CUDA, else of the process; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def keep_freed_memory(device: torch.device) -> None:
    """On CPUs, makes glibc keep freed memory in the process, for the next step to reuse.

    By default it returns large tensors to the system, which then has to zero their pages again: about a tenth of a
    step whose tensors exceed 32 MiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt is not None:
        for parameter, value in MALLOC_SETTINGS.items():
            mallopt(parameter, value)


WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


def zero_sum(device: torch.device) -> Tensor:
    """A 0-dim zero to add many numbers to: float64 if the device supports it."""
    dtype = torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
    return torch.zeros((), dtype=dtype, device=device)


def where_float64_is(tensor: Tensor) -> Tensor:
    """The tensor, on the host if its device has no float64."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def seed_everything(seed: int) -> None:
    """Seeds the random generators of PyTorch (all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class RandomState:
    """The random generators of PyTorch (host and device), NumPy and Python of every process, for snapshots."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks

    def state_dict(self) -> dict[str, Any]:
        """The generators' states by rank; a collective."""
        return {"ranks": self.ranks.all_gather(self._own())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores this process's generators; without a saved state for its rank or device, they are left alone."""
        if self.ranks.rank >= len(state["ranks"]):
            return
        own = state["ranks"][self.ranks.rank]
        torch.set_rng_state(own["torch"])
        kind, keys, position, has_gauss, gauss = own["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        version, internal, gauss_next = own["python"]
        random.setstate((version, tuple(internal), gauss_next))
        if self.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.device)
        if self.device.type == "mps" and "mps" in own:
            torch.mps.set_rng_state(own["mps"])

    def _own(self) -> dict[str, Any]:
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        own: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
            "python": random.getstate(),
        }
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            own["mps"] = torch.mps.get_rng_state()
        return own


def describe_device(device: torch.device) -> str:
    """The device and its name or number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)" if device.type == "cpu" else "mps"
