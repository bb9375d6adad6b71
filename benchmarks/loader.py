"""Data loading: how long a training step waits for data, and the cost of a batch compared with the usual loaders.

The peers draw the same kind of windows from the same file: `numpy memmap` opens it for every batch and takes windows
at random positions (as nanoGPT does), `DataLoader` is PyTorch's, over adjacent windows, shuffled. The larger model
computes in bf16 and without dropout, which makes its step shorter and the goal harder.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.made import close, make_store, make_trainer, shipped, train_macro_batch
from benchmarks.runner import Row, Setup, interleave
from cleangpt.config import DataConfig
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import DatasetSource, Samples, SplitStream
from cleangpt.experiment import Experiment

WAIT_GOAL = 0.01
LOADED_AHEAD = 5
"""Batches that a loader, ours or PyTorch's, may prefetch before timing starts; these would seem to cost nothing."""


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    dataset = make_store(setup.folder / "dataset", 100_000 if setup.quick else 1_000_000)
    shapes = [(12, 64), (4, 256)] if setup.quick else [(12, 64), (32, 1024)]
    rows = []
    for number, experiment in enumerate(experiments(setup.quick)):
        rows += waits(experiment, dataset, setup.folder / f"run{number}", setup.repetitions)
    for batch_size, seq_len in shapes:
        rows += against_peers(dataset, batch_size, seq_len, setup)
    return rows


def experiments(quick: bool) -> list[Experiment]:
    """The shipped CPU model at 12 x 64, and a 6 x 384 one at 32 x 1024 (smaller when `quick`)."""
    small = shipped("shakespeare_char_cpu", training={"batches_per_macro_batch": 3 if quick else 50})
    batch_size, seq_len = (4, 128) if quick else (32, 1024)
    large = shipped(
        "shakespeare_char",
        DataConfig(seq_len=seq_len, batch_size=batch_size),
        model={"max_seq_len": seq_len, "dropout": 0.0},
        training={"batches_per_macro_batch": 1, "micro_batch_size": 4, "precision": "bf16",
                  "accumulation": 1},
    )  # fmt: skip
    return [small, large]


def waits(experiment: Experiment, dataset: TokenDataset, run: Path, repetitions: int) -> list[Row]:
    """The time a training step waits for data, and the time to load its batch alone."""
    data, model = experiment.data, experiment.model
    label = f"{data.batch_size} × {data.seq_len}, {getattr(model, 'n_layers', '?')} × {getattr(model, 'dim', '?')}"
    trainer = make_trainer(experiment, dataset, run)
    loader = batch_loader(dataset, data.batch_size, data.seq_len)
    steps = experiment.training.batches_per_macro_batch

    def both() -> tuple[float, float, float]:
        return *train_macro_batch(trainer), timed(loader.next, 20 if steps == 1 else 200)

    taken = interleave({"both": both}, repetitions)["both"]
    close(trainer)
    loader.close()
    seconds, waited, loading = zip(*taken, strict=True)
    return [
        Row(f"{label}: wait for data in a step", "s", waited, "the step", seconds, WAIT_GOAL),
        Row(f"{label}: loading a batch, alone", "s", loading, "the step", seconds),
    ]


def against_peers(dataset: TokenDataset, batch_size: int, seq_len: int, setup: Setup) -> list[Row]:
    """The cost of a batch when nothing but loading happens."""
    path, dtype = dataset.folder / "train_00000.bin", np.dtype(dataset.description["dtype"])
    ours = batch_loader(dataset, batch_size, seq_len)
    makers: dict[str, Callable[[], object]] = {
        "ours": ours.next,
        "numpy memmap": lambda: random_windows(path, dtype, batch_size, seq_len),
    }
    for workers in (0,) if setup.quick else (0, 2):
        batches = data_loader(Windows(path, dtype, seq_len), batch_size, workers)
        makers[f"DataLoader, {workers} workers"] = batches.__next__
    count = 10 if setup.quick else 300 if seq_len < 256 else 60
    taken = interleave({name: partial(timed, make, count) for name, make in makers.items()}, setup.repetitions)
    ours.close()
    mine = taken.pop("ours")
    return [Row(f"{batch_size} × {seq_len}: a batch", "s", mine, name, theirs) for name, theirs in taken.items()]


def timed(make: Callable[[], object], count: int) -> float:
    """Seconds per call, over `count` calls after all prefetched batches are used up."""
    for _ in range(LOADED_AHEAD):
        make()
    start = time.perf_counter()
    for _ in range(count):
        make()
    return (time.perf_counter() - start) / count


def batch_loader(dataset: TokenDataset, batch_size: int, seq_len: int) -> DatasetSource:
    """Ours, as the trainer makes it."""
    return DatasetSource(SplitStream(Samples(dataset.splits["train"], seq_len), seed=1337), batch_size)


def random_windows(path: Path, dtype: np.dtype[np.generic], batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets `(batch, seq)`, int64, from windows at random positions of a token file."""
    tokens = np.memmap(path, dtype, mode="r")
    starts = torch.randint(len(tokens) - seq_len, (batch_size,)).tolist()
    rows = torch.from_numpy(np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Adjacent windows of a token file, for PyTorch's DataLoader."""

    def __init__(self, path: Path, dtype: np.dtype[np.generic], seq_len: int) -> None:
        self.path, self.dtype, self.seq_len = path, dtype, seq_len

    @cached_property
    def tokens(self) -> NDArray[np.generic]:
        """The memory map, opened by each worker itself: pickling one to a process would copy all its data."""
        return np.memmap(self.path, self.dtype, mode="r")

    def __len__(self) -> int:
        return (self.path.stat().st_size // self.dtype.itemsize - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.seq_len
        row = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        return row[:-1], row[1:]


def data_loader(windows: Windows, batch_size: int, workers: int) -> Iterator[list[Tensor]]:
    """PyTorch's batches, endlessly, epoch after epoch."""
    loader = DataLoader(
        windows,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))
