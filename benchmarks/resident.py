"""A fresh process that opens a token store many times: `python -m benchmarks.resident store|memmap FOLDER`.

Prints by how many bytes its resident memory grew per opening; "nan" where the system does not tell.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import page_bytes, resident_bytes
from benchmarks.store import memory_maps
from cleangpt.data.dataset import TokenDataset

TIMES = 10
"""A page is larger than what one opening may take."""
OPENERS: dict[str, Callable[[Path], object]] = {"store": TokenDataset, "memmap": memory_maps}


def main(kind: str, folder: Path) -> None:
    """Opens once to load all code, then `TIMES` times for the measurement, keeping all."""
    kept = [OPENERS[kind](folder)]
    gc.collect()
    before = resident_bytes()
    for _ in range(TIMES):
        kept.append(OPENERS[kind](folder))
    after = resident_bytes()
    print("nan" if before is None or after is None else max(after - before, page_bytes()) / TIMES)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
