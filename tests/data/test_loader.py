"""Batches are the dataset's tokens, each sample once an epoch, whatever loads them and whatever was skipped."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.batch import IGNORED
from cleangpt.data.columns import Column
from cleangpt.data.loader import DatasetSource, Samples, SplitStream, Stream, validation_batches
from cleangpt.data.mixing import MixedStream, interleave
from cleangpt.data.ranges import add_range
from cleangpt.data.shuffle import Order
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError

few = settings(max_examples=25, derandomize=True)


class Memory:
    """A split held in memory, as an independent stand-in for a memory-mapped one."""

    vocab_size = 2**62
    group = 1

    def __init__(
        self,
        tokens: np.ndarray,
        row_length: int | None = None,
        mask: np.ndarray | None = None,
        columns: dict[str, tuple[Column, np.ndarray]] | None = None,
    ) -> None:
        self.array, self.mask, self.row_length = tokens, mask, row_length
        self.tokens, self.masked = len(tokens), mask is not None
        self.documents = len(tokens) // row_length if row_length else 1
        self.records: dict[str, Any] = {}
        self.columns = {name: column for name, (column, _) in (columns or {}).items()}
        self.values = {name: values for name, (_, values) in (columns or {}).items()}

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= self.tokens
        return self.array[start : start + length]

    def read_mask(self, start: int, length: int) -> np.ndarray:
        assert self.mask is not None
        return self.mask[start : start + length]

    def read_column(self, name: str, start: int, length: int) -> np.ndarray:
        return self.values[name][start : start + length]


def counting(tokens: int, seq_len: int) -> Samples:
    return Samples(Memory(np.arange(tokens)), seq_len)  # type: ignore[arg-type]


@contextmanager
def loading(samples: Samples, batch_size: int, position: int = 0, **options: int) -> Iterator[DatasetSource]:
    source = DatasetSource(SplitStream(samples, 7), batch_size, **options)
    source.load_state_dict({"samples": position, "skipped_ranges": []})
    with closing(source):
        yield source


def tokens_of(source: DatasetSource, batches: int) -> list[list[list[int]]]:
    return [source.next().inputs["tokens"].tolist() for _ in range(batches)]


# What a batch holds ------------------------------------------------------------------------------------------------


@few
@given(seq_len=st.integers(1, 20), extra=st.integers(0, 60), epoch=st.integers(0, 3))
def test_an_epoch_reads_consecutive_windows_from_its_offset_once_each(seq_len: int, extra: int, epoch: int) -> None:
    samples = counting(2 * seq_len + extra, seq_len)
    n = samples.num_training
    batch = SplitStream(samples, 7).batch(epoch * n, n)
    offset = Order(n, 7).offset(epoch, seq_len)
    starts = sorted(batch.inputs["tokens"][:, 0].tolist())
    assert starts == [offset + index * seq_len for index in range(n)]
    assert (batch.targets == batch.inputs["tokens"] + 1).all()


@few
@given(seq_len=st.integers(1, 20), tokens=st.integers(2, 200), batch_size=st.integers(1, 7))
def test_validation_makes_every_token_but_the_first_a_target_once(seq_len: int, tokens: int, batch_size: int) -> None:
    if tokens < 2 * seq_len:
        tokens += 2 * seq_len
    batches = list(validation_batches(counting(tokens, seq_len), batch_size))
    targets = torch.cat([batch.targets[batch.targets != IGNORED] for batch in batches])
    assert targets.tolist() == list(range(1, tokens))
    assert sum(batch.num_targets for batch in batches) == tokens - 1
    assert {tuple(batch.inputs["tokens"].shape) for batch in batches} == {(batch_size, seq_len)}


def test_a_validation_subset_is_the_same_every_time_and_spread_out() -> None:
    samples = counting(64_001, 64)
    first, second = ([batch.inputs["tokens"] for batch in validation_batches(samples, 8, limit=100)] for _ in range(2))
    assert all((one == two).all() for one, two in zip(first, second, strict=True))
    starts = torch.cat(first)[:100, 0]
    assert len(set(starts.tolist())) == 100
    assert starts.min() < 6400 and starts.max() > 57_600


def test_rows_are_whole_and_only_answers_count() -> None:
    rows = np.arange(40).reshape(8, 5)
    mask = np.tile([0, 0, 0, 1, 1], 8)
    batch = SplitStream(Samples(Memory(rows.reshape(-1), 5, mask), 4), 7).batch(0, 8)  # type: ignore[arg-type]
    assert sorted(batch.inputs["tokens"].tolist()) == rows[:, :4].tolist()
    assert (batch.targets[:, :2] == IGNORED).all()
    assert (batch.targets[:, 2:] == batch.inputs["tokens"][:, 2:] + 1).all()
    assert batch.num_targets == 16


@few
@given(seq_len=st.integers(1, 9), tokens=st.integers(20, 60), position=st.integers(0, 40), rows=st.booleans())
def test_columns_stand_beside_the_tokens_that_they_belong_to(
    seq_len: int, tokens: int, position: int, rows: bool
) -> None:
    """An input beside what is read, an extra beside its target, whatever the order: values follow from token ids."""
    row_length = seq_len + 1 if rows else None
    ids = np.arange(tokens - tokens % (row_length or 1))
    columns = {
        "place": (Column(dtype="uint16", role="input"), (3 * ids).astype(np.uint16)),
        "reward": (Column(dtype="float32", role="extra"), (ids / 2).astype(np.float32)),
    }
    samples = Samples(Memory(ids, row_length, columns=columns), seq_len)  # type: ignore[arg-type]
    batch = SplitStream(samples, 7).batch(position, 5)
    assert (batch.inputs["place"] == 3 * batch.inputs["tokens"]).all()
    assert (batch.extras["reward"] == batch.targets / 2).all()
    assert (batch.inputs["place"].dtype, batch.extras["reward"].dtype) == (torch.int64, torch.float32)


def test_columns_are_zero_in_padding() -> None:
    columns = {"place": (Column(dtype="uint8", role="input"), np.full(8, 9, np.uint8))}
    samples = Samples(Memory(np.arange(8), 4, columns=columns), 6, pad_rows=True)  # type: ignore[arg-type]
    assert SplitStream(samples, 7).batch(0, 1).inputs["place"].tolist() == [[9, 9, 9, 9, 0, 0]]


@pytest.mark.parametrize(
    ("tokens", "training", "words"),
    [
        (19, True, r"20 tokens \(twice data.seq_len\)"),
        (1, True, r"20 tokens \(twice data.seq_len\)"),
        (1, False, "2 tokens"),
        (0, False, "2 tokens"),
    ],
)
def test_a_short_split_is_refused_in_one_line(tokens: int, training: bool, words: str) -> None:
    with pytest.raises(UserError, match=rf"the x split has {tokens} tokens; allowed: at least {words}$"):
        Samples(Memory(np.arange(tokens)), 10, "x", training=training)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [2, 3, 10, 11, 12, 19, 20, 21])
@pytest.mark.parametrize("seq_len", [1, 10])
def test_validation_needs_no_more_than_one_target(tokens: int, seq_len: int) -> None:
    """Every token but the first is a target once, however short the split."""
    samples = Samples(Memory(np.arange(100, 100 + tokens)), seq_len, training=False)  # type: ignore[arg-type]
    batches = list(validation_batches(samples, 4))
    targets = torch.cat([batch.targets[batch.targets != IGNORED] for batch in batches])
    assert targets.tolist() == list(range(101, 100 + tokens))


def test_a_sequence_that_is_not_the_row_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.seq_len is 5; allowed: 4"):
        Samples(Memory(np.arange(40), 5), 5)  # type: ignore[arg-type]


def test_a_dataset_on_disk_gives_the_same_batches_as_memory(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 5000)
    kind = Column(dtype="uint8", role="input")
    writer = DatasetWriter(tmp_path / "dataset", {}, ByteTokenizer(), columns={"place": kind}, shard_tokens=777)
    writer.append("train", tokens, np.array([5000]), columns={"place": 255 - tokens})
    stored = SplitStream(Samples(writer.finish(lambda _: "").splits["train"], 16), 10)
    split = Memory(tokens, columns={"place": (kind, (255 - tokens).astype(np.uint8))})
    memory = SplitStream(Samples(split, 16), 10)  # type: ignore[arg-type]
    for start in range(0, 700, 70):
        one, two = stored.batch(start, 70), memory.batch(start, 70)
        assert (one.inputs["tokens"] == two.inputs["tokens"]).all()
        assert (one.inputs["place"] == two.inputs["place"]).all()
        assert (one.targets == two.targets).all()


def test_an_id_beyond_the_vocabulary_is_named_with_its_location(tmp_path: Path) -> None:
    """In the second shard of a dataset of which somebody has changed two bytes."""
    writer = DatasetWriter(tmp_path / "dataset", {}, ByteTokenizer(), shard_tokens=100)
    writer.append("train", np.arange(250) % 250, np.array([250]))
    split = writer.finish(lambda _: "").splits["train"]
    assert Samples(split, 16).batch(np.arange(15), np.zeros(15, np.int64)).num_targets == 15 * 16
    with (tmp_path / "dataset" / "train_00001.bin").open("r+b") as file:
        file.seek(2 * 37)
        file.write((257).to_bytes(2, "little"))
    wrong = rf"^{tmp_path}/dataset/train_00001.bin, token 37, is 257; allowed: ids below 257, the vocabulary"
    with pytest.raises(UserError, match=wrong):
        Samples(split, 16).batch(np.arange(15), np.zeros(15, np.int64))
    with loading(Samples(split, 16), 15) as source, pytest.raises(UserError, match=wrong):
        source.next()


# The source --------------------------------------------------------------------------------------------------------


@few
@given(batch_size=st.sampled_from([4, 8, 12]), world_size=st.sampled_from([1, 2, 4]), position=st.integers(0, 300))
def test_devices_share_out_the_same_batches(batch_size: int, world_size: int, position: int) -> None:
    samples = counting(1000, 8)
    with loading(samples, batch_size, position) as whole:
        expected = tokens_of(whole, 3)
    parts = []
    for rank in range(world_size):
        with loading(samples, batch_size, position, rank=rank, world_size=world_size) as part:
            parts.append(tokens_of(part, 3))
    assert [list(chain(*batches)) for batches in zip(*parts, strict=True)] == expected


@few
@given(first=st.integers(1, 12), prefetch=st.integers(1, 5))
def test_a_new_source_continues_where_another_stopped(first: int, prefetch: int) -> None:
    samples = counting(500, 10)
    with loading(samples, 6) as unbroken:
        expected = tokens_of(unbroken, first + 5)[first:]
    with loading(samples, 6, prefetch=prefetch) as left:
        tokens_of(left, first)
        state = left.state_dict()
        assert state == {"samples": 6 * first, "skipped_ranges": []}
        left.load_state_dict(state)  # in the middle of loading ahead
        assert tokens_of(left, 5) == expected
    with loading(samples, 6) as resumed:
        resumed.load_state_dict(state)
        assert tokens_of(resumed, 5) == expected


def test_an_error_while_loading_reaches_the_caller() -> None:
    samples = counting(500, 10)
    samples.split.array = None  # type: ignore[attr-defined]
    with loading(samples, 6) as source, pytest.raises(TypeError):
        source.next()


@pytest.mark.parametrize(
    "state", [{"samples": -1}, {"samples": 2.0}, {"samples": 2**63}, {"skipped_ranges": [[0, "4"]]}]
)
def test_a_state_of_other_numbers_is_refused(state: dict[str, Any]) -> None:
    with loading(counting(100, 4), 2) as source, pytest.raises(ValueError, match="a position is"):
        source.load_state_dict({"samples": 0, "skipped_ranges": []} | state)


# Skipping ----------------------------------------------------------------------------------------------------------


def row_stream(n: int, seed: int) -> SplitStream:
    """Samples of which each holds its own number."""
    return SplitStream(Samples(Memory(np.repeat(np.arange(n), 3), 3), 2), seed)  # type: ignore[arg-type]


def numbers(stream: Stream, positions: list[int]) -> list[int]:
    return [int(stream.batch(position, 1).inputs["tokens"][0, 0]) for position in positions]


spans = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=4)


def skipping(stream: Stream, pairs: list[tuple[int, int]]) -> tuple[DatasetSource, list[int]]:
    """A source of batches of 4 that rolls back over each span of batches; the positions left to it, struck out."""
    source, kept = DatasetSource(stream, 4), list(range(400))
    for start, length in pairs:
        source.skip(4 * start, 4 * (start + length))
        source.load_state_dict({"samples": 4 * start, "skipped_ranges": []})
        del kept[4 * start : 4 * (start + length)]
    source.load_state_dict({"samples": 0, "skipped_ranges": []})
    return source, kept


@few
@given(pairs=spans, n=st.integers(1, 40), seed=st.integers(0, 99), batches=st.integers(0, 25))
def test_a_source_gives_what_is_left_when_the_skipped_positions_are_struck_out(
    pairs: list[tuple[int, int]], n: int, seed: int, batches: int
) -> None:
    """Batches, metrics and state, against a list of all positions."""
    stream = row_stream(n, seed)
    source, kept = skipping(row_stream(n, seed), pairs)
    with closing(source):
        read = [int(row[0]) for batch in tokens_of(source, batches) for row in batch]
    assert read == numbers(stream, kept[: 4 * batches])
    metrics = source.metrics()
    assert metrics["times_visited"] == pytest.approx(4 * batches / n)
    assert metrics["visited_share"] == pytest.approx(len(set(read)) / n)
    state = source.state_dict()
    skipped = {position for start, end in state["skipped_ranges"] for position in range(start, end)}
    assert state["samples"] == 4 * batches and skipped == set(range(400)) - set(kept)


@few
@given(pairs=spans, seed=st.integers(0, 99), batches=st.integers(0, 25))
def test_the_metrics_of_a_mixture_count_what_was_skipped_of_each_source(
    pairs: list[tuple[int, int]], seed: int, batches: int
) -> None:
    sizes = {"a": 7, "b": 30}
    streams = {name: row_stream(n, seed + n) for name, n in sizes.items()}
    mixed = MixedStream(streams, interleave(list(sizes), [0.25, 0.75], [None, None], 1000))
    source, kept = skipping(mixed, pairs)
    source.load_state_dict({"samples": 4 * batches, "skipped_ranges": []})
    metrics, sources = source.metrics(), mixed.interleaving.sources(0, 400)
    for number, (name, n) in enumerate(sizes.items()):
        mine = numbers(mixed, [position for position in kept[: 4 * batches] if sources[position] == number])
        assert metrics[f"times_visited/{name}"] == pytest.approx(len(mine) / n)
        assert metrics[f"visited_share/{name}"] == pytest.approx(len(set(mine)) / n)
    assert metrics["times_visited"] == pytest.approx(4 * batches / 37)


def test_what_is_skipped_outlives_a_roll_back_and_a_snapshot() -> None:
    source = DatasetSource(row_stream(40, 1), 4)
    with closing(source):
        tokens_of(source, 5)
        before = source.state_dict()
        source.skip(8, 20)
        source.load_state_dict(before | {"samples": 8})
        assert source.state_dict() == {"samples": 8, "skipped_ranges": [[8, 20]]}
        source.load_state_dict({"samples": 4, "skipped_ranges": [[16, 24], [28, 32]]})
        assert source.skipped_ranges == [[8, 24], [28, 32]]
        (first,), (second,), (third,) = (tokens_of(source, 1) for _ in range(3))
    stream = row_stream(40, 1)
    assert [row[0] for row in first + second + third] == numbers(stream, [4, 5, 6, 7, 24, 25, 26, 27, *range(32, 36)])


@few
@given(pairs=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=8))
def test_ranges_are_merged_sorted_and_apart(pairs: list[tuple[int, int]]) -> None:
    ranges: list[list[int]] = []
    for start, length in pairs:
        ranges = add_range(ranges, start, start + length)
    wanted = {position for start, length in pairs for position in range(start, start + length)}
    assert {position for start, end in ranges for position in range(start, end)} == wanted
    edges = [edge for pair in ranges for edge in pair]
    assert edges == sorted(set(edges))
