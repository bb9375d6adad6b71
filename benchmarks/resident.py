"""A fresh process that opens a dataset several times: `python -m benchmarks.resident store|memmap FOLDER`.

Prints the growth of its resident memory in bytes per opening; "nan" where the system does not report it.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import page_bytes, resident_bytes
from benchmarks.store import memory_maps
from cleangpt.data.dataset import TokenDataset

TIMES = 10
"""Several, since a page is larger than the memory that one opening should take."""
OPENERS: dict[str, Callable[[Path], object]] = {"store": TokenDataset, "memmap": memory_maps}


def main(kind: str, folder: Path) -> None:
    """Opens once to load all code, then `TIMES` times for the measurement, keeping all open."""
    kept = [OPENERS[kind](folder)]
    gc.collect()
    before = resident_bytes()
    for _ in range(TIMES):
        kept.append(OPENERS[kind](folder))
    after = resident_bytes()
    print("nan" if before is None or after is None else max(after - before, page_bytes()) / TIMES)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
