"""Opening a dataset of ten billion tokens, and whether loading stays as cheap as with a million.

The tokens beyond the first million are holes in sparse files: the cost is that of the code and of the system's page
cache, not of disk seeks. Memory is the growth of a fresh process's resident set per dataset opened and kept.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loader import batch_loader, timed
from benchmarks.made import make_store
from benchmarks.runner import Row, Setup, interleave
from cleangpt.data.dataset import TokenDataset

PROJECT = Path(__file__).parents[1]


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    few, many = (100_000, 3_000_000) if setup.quick else (1_000_000, 10_000_000_000)
    small, large = make_store(setup.folder / "small", few), make_store(setup.folder / "large", many)
    return [
        *opening(small, large, setup.repetitions),
        *memory(large, setup.repetitions),
        *loading(small, large, setup),
    ]


def opening(small: TokenDataset, large: TokenDataset, repetitions: int) -> list[Row]:
    """The time to open the large dataset, against plain memory maps of its files and against the small one."""
    makers: dict[str, Callable[[], object]] = {
        "ours": lambda: TokenDataset(large.folder),
        "np.memmap of the same files": lambda: memory_maps(large.folder),
        f"ours, {words(small)}": lambda: TokenDataset(small.folder),
    }
    taken = interleave({name: partial(timed, make, 20) for name, make in makers.items()}, repetitions)
    ours = taken.pop("ours")
    return [Row(f"open {words(large)}: time", "s", ours, name, theirs) for name, theirs in taken.items()]


def memory(large: TokenDataset, repetitions: int) -> list[Row]:
    """The resident memory that the large dataset takes when opened; no rows where the system does not report it."""
    kinds = ("ours", "np.memmap of the same files")
    taken = interleave({kind: partial(growth, kind, large.folder) for kind in kinds}, repetitions, warm_up=False)
    if any(np.isnan(taken["ours"])):
        return []
    size = [float(sum(path.stat().st_size for path in token_files(large.folder)))] * repetitions
    what = f"open {words(large)}: memory"
    return [
        Row(what, "B", taken["ours"], kinds[1], taken[kinds[1]]),
        Row(what, "B", taken["ours"], "the tokens", size),
    ]


def loading(small: TokenDataset, large: TokenDataset, setup: Setup) -> list[Row]:
    """The time of a batch from the large dataset against one from the small."""
    rows = []
    for batch_size, seq_len, count in [(12, 64, 20)] if setup.quick else [(12, 64, 300), (32, 1024, 60)]:
        loaders = {dataset.folder.name: batch_loader(dataset, batch_size, seq_len) for dataset in (small, large)}
        measures = {name: partial(timed, loader.next, count) for name, loader in loaders.items()}
        taken = interleave(measures, setup.repetitions)
        for loader in loaders.values():
            loader.close()
        what = f"{batch_size} × {seq_len}: a batch from {words(large)}"
        rows.append(Row(what, "s", taken["large"], f"ours, {words(small)}", taken["small"]))
    return rows


def words(dataset: TokenDataset) -> str:
    """The length of a dataset's training split, for a label."""
    return f"{dataset.splits['train'].tokens:,} tokens"


def token_files(folder: Path) -> list[Path]:
    """The shards of a dataset."""
    return sorted(path for path in folder.glob("*.bin") if not path.name.endswith("_documents.bin"))


def memory_maps(folder: Path) -> list[NDArray[Any]]:
    """Plain memory maps of the shards of a dataset."""
    return [np.memmap(path, "<u2", mode="r") for path in token_files(folder)]


def growth(kind: str, folder: Path) -> float:
    """What `python -m benchmarks.resident` prints: bytes per open dataset; NaN where not reported."""
    which = "store" if kind == "ours" else "memmap"
    command = [sys.executable, "-m", "benchmarks.resident", which, str(folder.resolve())]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT).stdout)
