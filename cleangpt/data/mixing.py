"""The source of each sample of a mixture: computed from the weights, never drawn at random or stored.

Of the first p samples, a source with share w contributes w · p, to within less than one sample, for every p. This is
the chairman assignment problem; its tight bound, 1 − 1/(2n − 2) for n sources, and the rule that reaches it are due to
Tijdeman (1980, "The chairman assignment problem"). Constant shares repeat a short pattern, so the number of samples
from each source before any position takes a division and one lookup in the pattern. Shares that change over the run's
progress are constant within stretches of it, and the same rule gives the samples of each source in each stretch.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.data.batch import Batch
from cleangpt.data.common import common_columns, common_tokenizer
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import Samples, SplitStream
from cleangpt.data.ranges import Ranges, with_members
from cleangpt.data.records import common_records
from cleangpt.data.shuffle import mix
from cleangpt.errors import UserError

Weight = float | tuple[tuple[float, float], ...]
"""A number, or points (progress, weight) that are interpolated linearly."""


PARTS = 10_000
"""Shares other than simple fractions are rounded to multiples of 1 / PARTS."""


STRETCH = 128
"""Minimum number of samples in a stretch of a run whose weights change."""


STRETCHES = 10_000
"""Maximum number of stretches in a run whose weights change."""


@dataclass(frozen=True)
class Stretch:
    """A range of positions from `start` on in which one pattern repeats."""

    start: int
    before: tuple[int, ...]
    """Samples of each source before `start`."""
    period: tuple[int, ...]
    """Samples of each source in one repetition of the pattern."""


class Interleaving:
    """The source at every position; the last stretch has no end."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches = stretches
        self._starts = [stretch.start for stretch in stretches]

    def taken(self, position: int) -> NDArray[np.int64]:
        """Samples of each source `(sources,)` before a position."""
        stretch = self.stretches[bisect_right(self._starts, position) - 1]
        repetitions, rest = divmod(position - stretch.start, sum(stretch.period))
        part = np.bincount(pattern(stretch.period)[:rest], minlength=len(stretch.period))
        taken: NDArray[np.int64] = np.array(stretch.before) + repetitions * np.array(stretch.period) + part
        return taken

    def sources(self, start: int, count: int) -> NDArray[np.int64]:
        """The source at each of the positions from `start` on, `(count,)`."""
        parts, end = [], start + count
        for index in range(bisect_right(self._starts, start) - 1, len(self.stretches)):
            stretch = self.stretches[index]
            stop = min(end, self._starts[index + 1]) if index + 1 < len(self._starts) else end
            places = (np.arange(start, stop) - stretch.start) % sum(stretch.period)
            parts.append(pattern(stretch.period)[places])
            start = stop
            if start == end:
                break
        return np.concatenate(parts)

    def end(self, source: int, samples: int) -> int | None:
        """The first position at which a source has contributed this many samples; None: never."""
        reached = [stretch for stretch in self.stretches if stretch.before[source] < samples]
        if not reached:
            return self._starts[0]
        stretch = reached[-1]
        each, missing = stretch.period[source], samples - stretch.before[source]
        if not each:
            return None
        repetitions = (missing - 1) // each
        places = np.flatnonzero(pattern(stretch.period) == source)
        return int(stretch.start + repetitions * sum(stretch.period) + places[missing - repetitions * each - 1] + 1)


def interleave(names: Sequence[str], weights: Sequence[Weight], most: Sequence[int | None], total: int) -> Interleaving:
    """The interleaving of a run of `total` samples.

    Args:
        names: of the sources, for messages.
        weights: of each source, in proportion to one another.
        most: samples after which each source ends, and its share goes to the others; None: it never ends.
        total: samples in the run, at which progress is 1. With constant weights, the sources of all positions below
            `total` do not depend on it.

    Raises:
        UserError: at some progress no source is left, or a source's share is too small.
    """
    stretches: list[Stretch] = []
    position, taken, left = 0, (0,) * len(names), [True] * len(names)
    while True:
        remaining = [weight if still else 0.0 for weight, still in zip(weights, left, strict=True)]
        following = Interleaving(_stretches(names, remaining, position, taken, total))
        ends = [
            following.end(source, samples) if samples is not None and left[source] else None
            for source, samples in enumerate(most)
        ]
        first = min((end for end in ends if end is not None), default=total)
        stretches += [stretch for stretch in following.stretches if stretch.start < first or first >= total]
        if first >= total:
            return Interleaving(stretches)
        position, taken = first, tuple(following.taken(first).tolist())
        left = [still and end != first for still, end in zip(left, ends, strict=True)]


def shares_at(weights: Sequence[Weight], progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each source's share of the samples `(len(progress), sources)`; rows without any weight are 0."""
    curves = np.stack([_curve(weight, progress) for weight in weights], axis=1)
    sums = curves.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(curves, sums, out=np.zeros_like(curves), where=sums > 0)
    return shares


def whole_counts(quotas: NDArray[np.int64], unit: int) -> NDArray[np.int64]:
    """Integers that follow growing quotas to within 1 − 1/(2n − 2).

    Every source first gets its lower bound; the rest goes to those that would fall behind soonest.

    Args:
        quotas: `(steps + 1, sources)`, in 1/unit; a row's sum is a multiple of `unit`, and the first row is 0.
        unit: of the quotas, 1 sample.

    Returns:
        `(steps + 1, sources)`: rows with the sums of the quotas, and columns that never fall.
    """
    parts = max(1, 2 * quotas.shape[1] - 2)
    slack = (parts - 1) * unit
    least = np.maximum(0, -((slack - parts * quotas) // (parts * unit)))
    most = ((parts * quotas + slack) // (parts * unit)).tolist()
    lacking, needed = least.T.tolist(), least.tolist()
    counts = [[0] * quotas.shape[1]]
    for step, total in enumerate((quotas.sum(axis=1) // unit).tolist()[1:], start=1):
        now = list(map(max, counts[-1], needed[step]))
        for _ in range(total - sum(now)):
            free = [source for source, count in enumerate(now) if count < most[step][source]]
            now[min(free, key=lambda source: bisect_right(lacking[source], now[source]))] += 1
        counts.append(now)
    return np.array(counts)


@lru_cache(maxsize=16)
def pattern(period: tuple[int, ...]) -> NDArray[np.int64]:
    """The source of each sample `(sum(period),)` of one repetition, given the number of samples of each source."""
    length = sum(period)
    counts = whole_counts(np.arange(length + 1)[:, None] * np.array(period), length)
    order: NDArray[np.int64] = np.argmax(np.diff(counts, axis=0), axis=1)
    return order


def _stretches(
    names: Sequence[str],
    weights: Sequence[Weight],
    start: int,
    taken: tuple[int, ...],
    total: int,
) -> list[Stretch]:
    """The stretches from `start` on, as if no source ended."""
    numbers = [weight for weight in weights if not isinstance(weight, tuple)]
    if len(numbers) == len(weights):
        return [Stretch(start, taken, _period(names, numbers, start, total))]
    length = max(STRETCH, -(-total // STRETCHES))
    starts = np.array([start, *range((start // length + 1) * length, max(total, start + 1), length)])
    lengths = np.diff(starts, append=max(total, start + 1))
    parts = _parts(shares_at(weights, (starts + lengths / 2) / total))
    if not (complete := parts.sum(axis=1) == PARTS).all():
        raise _nothing_left(names, int(starts[np.argmin(complete)]), total)
    quotas = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(lengths[:, None] * parts, axis=0)])
    counts = whole_counts(quotas, PARTS)
    before = (counts[:-1] + np.array(taken)).tolist()
    periods = np.diff(counts, axis=0).tolist()
    return [Stretch(*stretch) for stretch in zip(starts.tolist(), map(tuple, before), map(tuple, periods), strict=True)]


def _period(names: Sequence[str], weights: Sequence[float], start: int, total: int) -> tuple[int, ...]:
    """The smallest integers in proportion to the weights, rounded to parts of 1 / PARTS if they would be large."""
    if not any(weights):
        raise _nothing_left(names, start, total)
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    numbers = [int(fraction * scale) for fraction in exact]
    if sum(numbers) // math.gcd(*numbers) > PARTS:
        numbers = _parts(shares_at(weights, np.zeros(1)))[0].tolist()
        for name, number, weight in zip(names, numbers, weights, strict=True):
            if weight and not number:
                raise UserError(f"the source {name} has less than 1 in {2 * PARTS:,} samples; allowed: a larger weight")
    return tuple(number // math.gcd(*numbers) for number in numbers)


def _parts(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Shares `(rows, sources)` in units of 1 / PARTS, rounded by largest remainders; rows of zeros stay zero."""
    parts = np.floor(shares * PARTS).astype(np.int64)
    rank = np.argsort(np.argsort(parts - shares * PARTS, axis=1, kind="stable"), axis=1)
    missing = np.where(shares.any(axis=1), PARTS - parts.sum(axis=1), 0)
    return parts + (rank < missing[:, None])


def _curve(weight: Weight, progress: NDArray[np.float64]) -> NDArray[np.float64]:
    if not isinstance(weight, tuple):
        return np.full(len(progress), float(weight))
    return np.interp(progress, [point[0] for point in weight], [point[1] for point in weight])


def _nothing_left(names: Sequence[str], position: int, total: int) -> UserError:
    return UserError(
        f"no source of {', '.join(names)} is left after {position:,} of {total:,} samples; allowed: a larger "
        "max_epochs, weights above 0, or a shorter run"
    )


PROGRESS = (np.arange(1000) + 0.5) / 1000
"""Points of the run's progress over which changing shares are averaged."""


@dataclass(frozen=True)
class MixtureSource:
    """One dataset of a mixture."""

    dataset: TokenDataset
    name: str = ""
    """Name in metrics such as val_loss/NAME; empty for a single corpus, whose metrics are those of the run."""
    weight: Weight = 1.0
    """Relative to the other sources' weights."""
    max_epochs: int | None = None
    """Epochs after which the source ends; None: it repeats for the whole run."""


class MixedDataset:
    """The datasets of a run: one, or several that are mixed, with the same tokenizer, columns and chat template.

    Raises:
        UserError: two of them are incompatible.
    """

    def __init__(self, sources: Sequence[MixtureSource], error_on_exhaustion: bool = False) -> None:
        self.sources, self.error_on_exhaustion = list(sources), error_on_exhaustion
        first, *others = self.sources
        datasets = {source.name: source.dataset for source in self.sources}
        self.tokenizer, self.columns = common_tokenizer(datasets), common_columns(datasets)
        self.vocab_size, self.group = self.tokenizer.vocab_size, first.dataset.group
        for source in others:
            if source.dataset.group != self.group:
                raise UserError(
                    f"the sources {first.name} and {source.name} group rows differently, {self.group} and "
                    f"{source.dataset.group}; allowed: the same for all"
                )
        self.records = common_records({source.name: source.dataset.records for source in self.sources})
        for source in self.sources:
            source.dataset.add_records(self.records)
        chats = [source for source in self.sources if source.dataset.chat_template]
        self.chat_template = chats[0].dataset.chat_template if chats else None
        for source in chats:
            if source.dataset.chat_template != self.chat_template:
                raise UserError(
                    f"the sources {chats[0].name} and {source.name} have different chat templates; allowed: one for "
                    "all, given to each as chat_template"
                )
        if self.chat_template is not None:
            templates = [source.dataset.chat_template for source in self.sources]
            ends = {name for template in templates if template is not None for name in template.ends}
            self.chat_template = replace(self.chat_template, ends=tuple(sorted(ends)))


class MixedStream:
    """The samples of several streams; the position in each follows from that in the mixture."""

    def __init__(self, streams: Mapping[str, SplitStream], interleaving: Interleaving) -> None:
        self.streams, self.interleaving = streams, interleaving
        self._group = next(iter(streams.values())).samples.split.group

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on, both multiples of the group's size."""
        start, count = start // self._group, count // self._group
        if len(self.streams) == 1:
            (only,) = self.streams.values()
            return only.batch(start, count)
        sources, taken = self.interleaving.sources(start, count), self.interleaving.taken(start).tolist()
        rows, batches = [], []
        for source, stream in enumerate(self.streams.values()):
            mine = np.flatnonzero(sources == source)
            if len(mine):
                rows.append(with_members(mine, self._group))
                batches.append(stream.batch(taken[source], len(mine)))
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return Batch.cat(batches).rows(back)

    def progress(self, position: int, skipped_ranges: Ranges = ()) -> dict[str, float]:
        """The metrics visited_share and times_visited up to a position, for all sources together and for each.

        A skipped range of the mixture is a range in each source, too.
        """
        position //= self._group
        skipped_ranges = [(start // self._group, end // self._group) for start, end in skipped_ranges]
        taken = self.interleaving.taken(position).tolist()
        bounds = [[self.interleaving.taken(bound).tolist() for bound in pair] for pair in skipped_ranges]
        each = {
            name: stream.progress(taken[source], [(start[source], end[source]) for start, end in bounds])
            for source, (name, stream) in enumerate(self.streams.items())
        }
        sizes = {name: stream.order.num_samples for name, stream in self.streams.items()}
        seen = sum(each[name]["visited_share"] * size for name, size in sizes.items())
        total = sum(sizes.values())
        missed = sum(min(end, position) - start for start, end in skipped_ranges if start < position)
        metrics = {"visited_share": seen / total, "times_visited": (position - missed) / total}
        for metric in list(metrics):
            metrics |= {f"{metric}/{name}": progress[metric] for name, progress in each.items() if name}
        return metrics


def split_samples(dataset: MixedDataset, split: str, seq_len: int) -> dict[str, Samples]:
    """The samples of a split by source; rows of a mixture's sources are padded, those of a single corpus must fit.

    Raises:
        UserError: a split is missing or too short, or its rows do not fit into `seq_len`.
    """
    return {
        source.name: Samples(
            source.dataset.splits[split],
            seq_len,
            f"{split} (of {source.name})" if source.name else split,
            pad_rows=bool(source.name),
            training=split == "train",
        )
        for source in dataset.sources
    }


def mean_shares(dataset: MixedDataset) -> dict[str, float]:
    """Each source's share of the samples according to its weight, averaged over the run."""
    shares = shares_at([source.weight for source in dataset.sources], PROGRESS).mean(axis=0)
    names = [source.name for source in dataset.sources]
    return dict(zip(names, (shares / shares.sum()).tolist(), strict=True))


def training_stream(dataset: MixedDataset, seq_len: int, seed: int, total: int) -> MixedStream:
    """The training samples of a run of `total` samples.

    Raises:
        UserError: a training split does not fit, a source ends although that is an error, or none is left.
    """
    samples, group = split_samples(dataset, "train", seq_len), len(dataset.group) or 1
    total //= group
    most = [
        None if source.max_epochs is None else source.max_epochs * (samples[source.name].num_training // group)
        for source in dataset.sources
    ]
    interleaving = interleave(list(samples), [source.weight for source in dataset.sources], most, total)
    for number, (name, end) in enumerate(zip(samples, most, strict=True)):
        position = None if end is None else interleaving.end(number, end)
        if dataset.error_on_exhaustion and position is not None and position < total:
            raise UserError(
                f"the source {name} ends after {position * group:,} of the run's {total * group:,} samples; allowed: "
                'a larger max_epochs or a shorter run, or corpus.when_source_ends="share"'
            )
    streams = {
        name: SplitStream(part, mix(seed, number) if name else seed)
        for number, (name, part) in enumerate(samples.items())
    }
    return MixedStream(streams, interleaving)
