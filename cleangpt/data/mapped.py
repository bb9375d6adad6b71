"""Memory-mapped files of numbers, and the counts that describe them."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.errors import UserError


def little_endian(dtype: str) -> np.dtype[Any]:
    """A dtype as it is on disk, the same on every machine."""
    found: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
    return found


def map_file(path: Path | None, dtype: np.dtype[Any], length: int, shuffled: bool) -> NDArray[Any]:
    """Memory-maps `path`; checks that its size is that of `length` numbers.

    A file that is read `shuffled` gains nothing from the system's readahead, which is switched off. None: there is no
    file, and the numbers are zeros that take no memory.

    Raises:
        UserError: the file is missing or has another size.
    """
    if path is None:
        return np.broadcast_to(np.zeros(1, dtype), length)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run cleangpt prepare --again") from None
    if size != length * dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, not {length * dtype.itemsize:,}; run cleangpt prepare --again")
    if length == 0:
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if shuffled and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, length)


def read_count(facts: Mapping[str, Any], name: str) -> int:
    """A count from a description; raises ValueError for anything else."""
    count = facts[name]
    if type(count) is not int or count < 0:
        raise ValueError(f"{name} is {count!r}")
    return count
