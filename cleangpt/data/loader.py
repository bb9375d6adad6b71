"""From a dataset to batches, in order, prefetched in the background."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.data.dataset import Split
from cleangpt.data.ranges import Ranges, add_range, with_members, without_ranges
from cleangpt.data.records import record_inputs
from cleangpt.data.shuffle import Order, mix, permute
from cleangpt.errors import UserError

ORDERED = 4096
"""Number of positions whose samples are computed at once, at most an epoch."""


class Samples:
    """A split divided into samples of `seq_len` inputs and targets.

    A dataset with a row length has one sample per row. Any other is divided into windows, each starting with the last
    target of the one before it. For training, the windows start after an offset that changes with the epoch, and the
    tokens left over at both ends (fewer than 2 x seq_len) are unused in that epoch. For validation the windows start
    at 0 and the last is padded, so that every token but the first is a target exactly once.

    Raises:
        UserError: the split is too short, or its rows have another length; with `pad_rows`, they may be shorter.
    """

    def __init__(
        self, split: Split, seq_len: int, name: str = "split", *, pad_rows: bool = False, training: bool = True
    ) -> None:
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
        if (self.num_training if training else self.num_validation) < 1:
            tokens = f"{2 * seq_len:,} tokens (twice data.seq_len)" if training else "2 tokens"
            needed = tokens if split.row_length is None else "one row"
            raise UserError(f"the {name} split has {split.tokens:,} tokens; allowed: at least {needed}")

    def batch(self, samples: NDArray[np.int64], offsets: NDArray[np.int64]) -> Batch:
        """The given samples `(batch,)`, each window shifted by its offset `(batch,)` in tokens.

        Extra columns of the split become inputs or extras `(batch, seq_len)`, 0 in padding; records: see records.py.

        Raises:
            UserError: a token is not in the vocabulary, so the file has changed since it was prepared.
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
                f"{self.split.location(starts[row] + column)}, is {tokens[row, column]}; allowed: ids below "
                f"{self.split.vocab_size:,}, the vocabulary; run cleangpt prepare --again"
            )
        targets = np.where(counts[:, 1:], tokens[:, 1:], IGNORED)
        inputs = {"tokens": torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))}
        batch = Batch(inputs, torch.from_numpy(targets), group=self.split.group)
        for name, column in self.split.columns.items():
            values = np.zeros(tokens.shape, column.in_batch)
            for row, start in enumerate(starts):
                length = min(self._window, self.split.tokens - start)
                values[row, :length] = self.split.read_column(name, start, length)
            seen, part = (batch.inputs, slice(-1)) if column.role == "input" else (batch.extras, slice(1, None))
            seen[name] = torch.from_numpy(np.ascontiguousarray(values[:, part]))
        batch.inputs |= record_inputs(self.split.records, starts, self._window - 1)
        return batch


def validation_batches(
    samples: Samples, batch_size: int, limit: int | None = None, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Batches of the whole split, or of `limit` samples, always the same ones, chosen by a fixed permutation.

    Each `rank` of `world_size` devices gets its own batches of `batch_size`; all get the same number. Every batch has
    the same shape, so that a compiled model is compiled once: the last batch is filled up with samples without targets.
    """
    chosen, group = np.arange(samples.num_validation // samples.split.group), samples.split.group
    if limit is not None and limit < len(chosen) * group:
        chosen = np.sort(permute(chosen[: limit // group], len(chosen), mix(0)))
    chosen = with_members(chosen, group)
    for first in range(0, len(chosen), batch_size * world_size):
        start = first + rank * batch_size
        part = chosen[start : start + batch_size]
        batch = samples.batch(
            np.resize(part if len(part) else chosen, batch_size), np.zeros(batch_size, dtype=np.int64)
        )
        batch.targets[len(part) :] = IGNORED
        yield batch


class Stream(Protocol):
    """An endless stream of training samples; a position in it is the number of samples before it."""

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on."""

    def progress(self, position: int, skipped_ranges: Ranges = ()) -> dict[str, float]:
        """The metrics visited_share and times_visited up to a position, given the skipped positions."""


class SplitStream:
    """The samples of a split in shuffled order, epoch after epoch; a position is a group's, if there are groups."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.order = samples, Order(samples.num_training // samples.split.group, seed)
        self._ordered = (0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on."""
        epochs, groups = self._order_from(start, count)
        samples = with_members(groups, self.samples.split.group)
        offsets = np.zeros_like(samples)
        if self.samples.split.row_length is None:
            for epoch in np.unique(epochs):
                offsets[epochs == epoch] = self.order.offset(int(epoch), self.samples.seq_len)
        return self.samples.batch(samples, offsets)

    def progress(self, position: int, skipped_ranges: Ranges = ()) -> dict[str, float]:
        """The metrics visited_share and times_visited before a position, where some positions were skipped."""
        ranges = np.array([(start, min(end, position)) for start, end in skipped_ranges if start < position], np.int64)
        ranges = ranges.reshape(-1, 2)
        times = (position - int((ranges[:, 1] - ranges[:, 0]).sum())) / self.order.num_samples
        share = min(1.0, times) if not len(ranges) else self._visited_share(position, ranges)
        return {"visited_share": share, "times_visited": times}

    def _visited_share(self, position: int, ranges: NDArray[np.int64]) -> float:
        """The share visited at least once: a sample counts unless the first and every later epoch so far skipped it."""
        n = self.order.num_samples
        if position < n:
            return (position - int((ranges[:, 1] - ranges[:, 0]).sum())) / n
        inside = [np.arange(start, min(end, n)) for start, end in ranges.tolist() if start < n]
        _, missed = self.order.at(np.concatenate([np.zeros(0, np.int64), *inside]))
        for epoch in range(1, position // n + 1):
            if not len(missed):
                break
            positions = self.order.positions(missed, epoch)
            before = np.searchsorted(ranges[:, 0], positions, side="right") - 1
            within = (before >= 0) & (positions < ranges[before, 1])
            missed = missed[within | (positions >= position)]
        return 1 - len(missed) / n

    def _order_from(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and samples of `count` positions; many are computed at once, which costs hardly more than a few."""
        first, epochs, samples = self._ordered
        if not first <= start <= start + count <= first + len(samples):
            ahead = max(count, min(ORDERED, self.order.num_samples))
            first, (epochs, samples) = start, self.order.at(np.arange(start, start + ahead))
            self._ordered = first, epochs, samples
        part = slice(start - first, start - first + count)
        return epochs[part], samples[part]


class DatasetSource:
    """Training batches of a stream, in order; a thread loads up to `prefetch` of them ahead.

    Its state is the number of samples consumed, over all devices, and the ranges of the stream that it skips: complete
    batches, which do not count as consumed. Each `rank` of `world_size` devices gets a contiguous part of every batch,
    so the order of samples does not depend on the number of devices.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        *,
        prefetch: int = 4,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.prefetch, self.pin_memory = stream, batch_size, prefetch, pin_memory
        self.rank, self.world_size = rank, world_size
        self.samples = 0
        """Consumed so far, over all devices."""
        self.skipped_ranges: list[list[int]] = []
        """Ranges of positions of the stream."""
        self.wait_time = 0.0
        """Seconds that `next` has waited for a batch, since the start."""
        self._loader: _Loader | None = None

    def next(self) -> Batch:
        """This device's part of the next batch, on the host."""
        start = time.perf_counter()
        if self._loader is None:
            self._loader = _Loader(self._batches(self.samples, self.skipped_ranges), self.prefetch)
        batch = self._loader.next()
        self.wait_time += time.perf_counter() - start
        self.samples += self.batch_size
        return batch

    def metrics(self) -> dict[str, float]:
        """visited_share and times_visited; of a mixture also those of each source, such as visited_share/NAME."""
        return self.stream.progress(without_ranges(self.samples, self.skipped_ranges), self.skipped_ranges)

    def skip(self, start: int, end: int) -> None:
        """Skips the samples between positions `start` and `end`, both at batch boundaries, from now on.

        Called before `load_state_dict` returns to `start` or earlier, which does not undo the skip.
        """
        first, last = (without_ranges(position, self.skipped_ranges) for position in (start, end - 1))
        self.skipped_ranges = add_range(self.skipped_ranges, first, last + 1)

    def state_dict(self) -> dict[str, Any]:
        """The samples consumed, and the ranges of the stream that are skipped."""
        return {"samples": self.samples, "skipped_ranges": [list(pair) for pair in self.skipped_ranges]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; ranges skipped already stay skipped.

        Raises:
            ValueError: a number in it is not a position.
        """
        samples, ranges = state["samples"], state["skipped_ranges"]
        for number in (samples, *(edge for first, last in ranges for edge in (first, last))):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"a position is {number!r}")
        self.close()
        self.samples = samples
        for first, last in ranges:
            self.skipped_ranges = add_range(self.skipped_ranges, first, last)

    def close(self) -> None:
        """Stops the thread; batches loaded ahead are dropped."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _batches(self, position: int, skipped_ranges: Ranges) -> Iterator[Batch]:
        """This device's parts of the batches from a position on."""
        part = self.batch_size // self.world_size
        while True:
            start = without_ranges(position + self.rank * part, skipped_ranges)
            batch = self.stream.batch(start, part)
            yield batch.pin() if self.pin_memory else batch
            position += self.batch_size


class _Loader:
    """A thread that keeps a queue of batches filled."""

    def __init__(self, batches: Iterator[Batch], prefetch: int) -> None:
        self._batches = batches
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._load, name="batch-loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch; raises an error that occurred in the thread."""
        batch = self._queue.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Stops the thread."""
        self._closing.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.01)

    def _load(self) -> None:
        try:
            while not self._closing.is_set():
                self._queue.put(next(self._batches))
        except BaseException as error:
            self._queue.put(error)
