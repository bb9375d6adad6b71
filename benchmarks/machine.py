"""What a result depends on besides the code: processor, memory, system, versions; and a process's memory use."""

import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from cleangpt import __version__
from cleangpt.distributed.device import peak_memory


def facts() -> str:
    """Date, machine and versions in one line."""
    memory = _memory()
    load = f", load average before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return " · ".join(
        [
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            _cpu(),
            f"{os.cpu_count()} cores, PyTorch threads {torch.get_num_threads()}{load}",
            f"{memory / 2**30:.0f} GiB memory" if memory else "memory unknown",
            f"{platform.system()} {platform.release()}",
            f"Python {platform.python_version()}, PyTorch {torch.__version__}, NumPy {np.__version__}, "
            f"CleanGPT {__version__}",
        ]
    )


def resident_bytes() -> int | None:
    """This process's resident memory now, in bytes; None where the system does not report it (Windows)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * page_bytes()
    if sys.platform == "win32":
        return None
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid()))) * 1024


def peak_resident_bytes() -> int | None:
    """This process's peak resident memory, in bytes; None where the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from the peak of the parent process there
        (line,) = [line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return peak_memory(torch.device("cpu"))


def page_bytes() -> int:
    """The size of a memory page."""
    return os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def _cpu() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """The machine's memory in bytes; None where the system does not report it."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * page_bytes()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
