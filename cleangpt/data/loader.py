"""From the token store to batches, in order, with the next ones loaded in the background."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.data.dataset import Split
from cleangpt.data.shuffle import Order, mix, permute
from cleangpt.errors import UserError

ORDERED = 4096
"""Positions whose samples are computed at once."""


class Samples:
    """A split cut into samples of `seq_len` inputs and targets.

    A store with a row length has a sample per row. Any other is cut into windows, each beginning with the last target
    of the one before it. For training, the windows start after an offset that changes with the epoch, and the tokens
    left over at both ends (fewer than 2 x seq_len) wait for another epoch. For validation the windows start at 0
    and the last is padded, so that every token but the first is a target exactly once.

    Raises:
        UserError: the split is too short, or its rows do not fit; with `pad_rows`, shorter rows do.
    """

    def __init__(self, split: Split, seq_len: int, name: str = "split", *, pad_rows: bool = False) -> None:
        self.split, self.seq_len = split, seq_len
        self._window = min(seq_len + 1, split.row_length or seq_len + 1)
        if split.row_length is not None:
            if seq_len < split.row_length - 1 or (seq_len > split.row_length - 1 and not pad_rows):
                raise UserError(
                    f"data.seq_len is {seq_len}; allowed: {split.row_length - 1}{' or more' * pad_rows}, "
                    "the corpus's row length - 1"
                )
            self.num_training = self.num_validation = split.documents
        else:
            self.num_training = split.tokens // seq_len - 1
            self.num_validation = -(-(split.tokens - 1) // seq_len)
        if min(self.num_training, self.num_validation) < 1:
            needed = "one row" if split.row_length is not None else f"{2 * seq_len:,} tokens (twice data.seq_len)"
            raise UserError(f"the {name} split has {split.tokens:,} tokens; allowed: at least {needed}")

    def batch(self, samples: NDArray[np.int64], offsets: NDArray[np.int64]) -> Batch:
        """The given samples `(batch,)`, each window shifted by its offset `(batch,)` in tokens.

        Raises:
            UserError: a token is not in the vocabulary; the file has changed since it was made.
        """
        stride = self.split.row_length or self.seq_len
        tokens = np.zeros((len(samples), self.seq_len + 1), dtype=np.int64)
        counts = np.zeros((len(samples), self.seq_len + 1), dtype=bool)
        starts = (samples * stride + offsets).tolist()
        for row, start in enumerate(starts):
            length = min(self._window, self.split.tokens - start)
            tokens[row, :length] = self.split.read(start, length)
            counts[row, :length] = self.split.read_mask(start, length) if self.split.masked else True
        if tokens.max(initial=0) >= self.split.vocab_size:
            row, column = np.argwhere(tokens >= self.split.vocab_size)[0].tolist()
            raise UserError(
                f"{self.split.place(starts[row] + column)}, is {tokens[row, column]}; allowed: ids below "
                f"{self.split.vocab_size:,}, the vocabulary; run cleangpt prepare --again"
            )
        targets = np.where(counts[:, 1:], tokens[:, 1:], IGNORED)
        inputs = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))
        return Batch({"tokens": inputs}, torch.from_numpy(targets))


def validation_batches(
    samples: Samples, batch_size: int, limit: int | None = None, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The whole split, or `limit` samples of it that are the same every time, spread by a fixed permutation.

    `rank` of `world_size` devices gets batches of `batch_size` of its own; all get the same number of them.
    Every batch has the same shape, which spares compiled models a second shape: the last is filled up with samples
    that have no targets.
    """
    chosen = np.arange(samples.num_validation)
    if limit is not None and limit < len(chosen):
        chosen = np.sort(permute(chosen[:limit], len(chosen), mix(0)))
    for first in range(0, len(chosen), batch_size * world_size):
        start = first + rank * batch_size
        part = chosen[start : start + batch_size]
        batch = samples.batch(
            np.resize(part if len(part) else chosen, batch_size), np.zeros(batch_size, dtype=np.int64)
        )
        batch.targets[len(part) :] = IGNORED
        yield batch


Ranges = Sequence[Sequence[int]]
"""Positions of a stream: pairs of the first and the one after the last, in order, with gaps between."""


class Stream(Protocol):
    """An endless row of training samples: a position in it is the number of samples before it."""

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on."""

    def progress(self, position: int, skipped_ranges: Ranges = ()) -> dict[str, float]:
        """The figures visited_share and times_visited before a position, where some positions were left out."""


class SplitStream:
    """The samples of a split, in their order, epoch after epoch."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.order = samples, Order(samples.num_training, seed)
        self._ordered = (0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on."""
        epochs, samples = self._order_from(start, count)
        offsets = np.zeros_like(samples)
        if self.samples.split.row_length is None:
            for epoch in np.unique(epochs):
                offsets[epochs == epoch] = self.order.offset(int(epoch), self.samples.seq_len)
        return self.samples.batch(samples, offsets)

    def progress(self, position: int, skipped_ranges: Ranges = ()) -> dict[str, float]:
        """The figures visited_share and times_visited before a position, where some positions were left out."""
        ranges = np.array([(start, min(end, position)) for start, end in skipped_ranges if start < position], np.int64)
        ranges = ranges.reshape(-1, 2)
        times = (position - int((ranges[:, 1] - ranges[:, 0]).sum())) / self.samples.num_training
        share = min(1.0, times) if not len(ranges) else self._visited_share(position, ranges)
        return {"visited_share": share, "times_visited": times}

    def _visited_share(self, position: int, ranges: NDArray[np.int64]) -> float:
        """The samples that no epoch has visited are those that the first left out, less those of each later one."""
        n = self.samples.num_training
        if position < n:
            return (position - int((ranges[:, 1] - ranges[:, 0]).sum())) / n
        inside = [np.arange(start, min(end, n)) for start, end in ranges.tolist() if start < n]
        _, missed = self.order.at(np.concatenate([np.zeros(0, np.int64), *inside]))
        for epoch in range(1, position // n + 1):
            if not len(missed):
                break
            places = self.order.positions(missed, epoch)
            before = np.searchsorted(ranges[:, 0], places, side="right") - 1
            within = (before >= 0) & (places < ranges[before, 1])
            missed = missed[within | (places >= position)]
        return 1 - len(missed) / n

    def _order_from(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and samples of `count` positions; many are computed at once, which costs hardly more than a few."""
        first, epochs, samples = self._ordered
        if not first <= start <= start + count <= first + len(samples):
            first, (epochs, samples) = start, self.order.at(np.arange(start, start + max(count, ORDERED)))
            self._ordered = first, epochs, samples
        part = slice(start - first, start - first + count)
        return epochs[part], samples[part]


class StreamWithout:
    """A stream of which ranges of positions are left out; a position in it counts what is not.

    A batch must not reach across a range: those left out are whole batches.
    """

    def __init__(self, stream: Stream, skipped_ranges: Ranges) -> None:
        self.stream, self.skipped_ranges = stream, skipped_ranges

    def place(self, position: int) -> int:
        """The position in the whole stream of the sample at a position in this one."""
        for start, end in self.skipped_ranges:
            if position >= start:
                position += end - start
        return position

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on."""
        return self.stream.batch(self.place(start), count)

    def progress(self, position: int, skipped_ranges: Ranges = ()) -> dict[str, float]:
        """The figures visited_share and times_visited before a position."""
        return self.stream.progress(self.place(position), [*self.skipped_ranges, *skipped_ranges])


def add_range(skipped_ranges: Ranges, start: int, end: int) -> list[list[int]]:
    """The ranges with another one, which may overlap them."""
    merged: list[list[int]] = []
    for first, last in sorted([*map(tuple, skipped_ranges), (start, end)]):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


class BatchLoader:
    """Training batches from a position on, in order; a thread loads up to `prefetch` of them ahead.

    `rank` of `world_size` devices gets its own consecutive part of every batch, so the order of samples is the same
    whatever the number of devices.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        position: int,
        *,
        prefetch: int = 4,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.position = stream, batch_size, position
        self.pin_memory, self.rank, self.world_size = pin_memory, rank, world_size
        self.wait_time = 0.0
        """Seconds that `next` has waited, since the start."""
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._load, args=(position,), name="batch-loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """This device's part of the batch at `position`, which moves on by `batch_size`."""
        start = time.perf_counter()
        batch = self._queue.get()
        self.wait_time += time.perf_counter() - start
        if isinstance(batch, BaseException):
            raise batch
        self.position += self.batch_size
        return batch

    def close(self) -> None:
        """Ends the thread; batches loaded ahead are dropped."""
        self._closing.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.01)

    def _load(self, position: int) -> None:
        try:
            while not self._closing.is_set():
                self._queue.put(self._batch(position))
                position += self.batch_size
        except BaseException as error:
            self._queue.put(error)

    def _batch(self, position: int) -> Batch:
        part = self.batch_size // self.world_size
        batch = self.stream.batch(position + self.rank * part, part)
        return batch.pin() if self.pin_memory else batch


class DatasetSource:
    """Interim."""

    def __init__(
        self, stream: Stream, batch_size: int, *, prefetch: int, pin_memory: bool, rank: int, world_size: int
    ) -> None:
        self.stream, self.batch_size = StreamWithout(stream, []), batch_size
        self.settings = {"prefetch": prefetch, "pin_memory": pin_memory, "rank": rank, "world_size": world_size}
        self.position, self.waited, self.loader = 0, 0.0, None

    def _open(self) -> BatchLoader:
        if self.loader is None:
            self.loader = BatchLoader(self.stream, self.batch_size, self.position, **self.settings)
        return self.loader

    @property
    def wait_time(self) -> float:
        return self.waited + (self.loader.wait_time if self.loader else 0)

    def next(self) -> Batch:
        batch = self._open().next()
        self.position += self.batch_size
        return batch

    def metrics(self) -> dict[str, float]:
        return self.stream.progress(self.position)

    def skip(self, start: int, end: int) -> None:
        first, last = self.stream.place(start), self.stream.place(end - 1) + 1
        self.close()
        self.stream.skipped_ranges = add_range(self.stream.skipped_ranges, first, last)

    def state_dict(self):
        return {"samples": self.position, "skipped_ranges": [list(r) for r in self.stream.skipped_ranges]}

    def load_state_dict(self, state) -> None:
        self.close()
        self.position = state["samples"]
        ranges = self.stream.skipped_ranges
        for first, last in state["skipped_ranges"]:
            ranges = add_range(ranges, first, last)
        self.stream.skipped_ranges = ranges

    def close(self) -> None:
        if self.loader is not None:
            self.waited += self.loader.wait_time
            self.loader.close()
            self.loader = None
