"""Batches are the store's tokens, each sample once an epoch, whatever loads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.batch import IGNORED
from cleangpt.data.loader import BatchLoader, Samples, SplitStream, validation_batches
from cleangpt.data.shuffle import Order
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError


class Memory:
    """A split held in memory, as an independent stand-in for a memory-mapped one."""

    vocab_size = 2**62

    def __init__(self, tokens: np.ndarray, row_length: int | None = None, mask: np.ndarray | None = None) -> None:
        self.array, self.mask, self.row_length = tokens, mask, row_length
        self.tokens, self.masked = len(tokens), mask is not None
        self.documents = len(tokens) // row_length if row_length else 1

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= self.tokens
        return self.array[start : start + length]

    def read_mask(self, start: int, length: int) -> np.ndarray:
        return self.mask[start : start + length]


def counting(tokens: int, seq_len: int) -> Samples:
    return Samples(Memory(np.arange(tokens)), seq_len)


def loader(samples: Samples, batch_size: int, position: int = 0, **options: int) -> BatchLoader:
    return BatchLoader(SplitStream(samples, 7), batch_size, position, **options)


@given(seq_len=st.integers(1, 20), extra=st.integers(0, 100), epoch=st.integers(0, 3))
def test_an_epoch_reads_consecutive_windows_from_its_offset_once_each(seq_len: int, extra: int, epoch: int) -> None:
    samples = counting(2 * seq_len + extra, seq_len)
    n = samples.num_training
    batches = loader(samples, 1, epoch * n)
    read = [batches.next() for _ in range(n)]
    batches.close()
    offset = Order(n, 7).offset(epoch, seq_len)
    starts = sorted(int(batch.inputs["tokens"][0, 0]) for batch in read)
    assert starts == [offset + index * seq_len for index in range(n)]
    assert all((batch.targets == batch.inputs["tokens"] + 1).all() for batch in read)


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
    samples = Samples(Memory(rows.reshape(-1), 5, mask), 4)
    batches = loader(samples, 8)
    batch = batches.next()
    batches.close()
    assert sorted(batch.inputs["tokens"].tolist()) == rows[:, :4].tolist()
    assert (batch.targets[:, :2] == IGNORED).all()
    assert (batch.targets[:, 2:] == batch.inputs["tokens"][:, 2:] + 1).all()
    assert batch.num_targets == 16


@given(batch_size=st.sampled_from([4, 8, 12]), world_size=st.sampled_from([1, 2, 4]), position=st.integers(0, 300))
def test_devices_share_out_the_same_batches(batch_size: int, world_size: int, position: int) -> None:
    samples = counting(1000, 8)
    whole = loader(samples, batch_size, position)
    parts = [loader(samples, batch_size, position, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(3):
        expected = whole.next().inputs["tokens"]
        assert (torch.cat([part.next().inputs["tokens"] for part in parts]) == expected).all()
    for each in (whole, *parts):
        each.close()


@given(first=st.integers(1, 30), prefetch=st.integers(1, 5))
def test_a_new_loader_goes_on_where_another_was_left(first: int, prefetch: int) -> None:
    samples = counting(500, 10)
    unbroken = loader(samples, 6)
    expected = [unbroken.next().inputs["tokens"] for _ in range(first + 5)][first:]
    left = loader(samples, 6, prefetch=prefetch)
    for _ in range(first):
        left.next()
    resumed = loader(samples, 6, left.position)
    assert all((resumed.next().inputs["tokens"] == batch).all() for batch in expected)
    for each in (unbroken, left, resumed):
        each.close()


def test_an_error_while_loading_reaches_the_caller() -> None:
    samples = counting(500, 10)
    samples.split.array = None  # type: ignore[attr-defined]
    batches = loader(samples, 6)
    with pytest.raises(TypeError):
        batches.next()
    batches.close()


def test_a_short_split_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"the val split has 19 tokens; allowed: at least 20 tokens"):
        Samples(Memory(np.arange(19)), 10, "val")


def test_a_sequence_that_is_not_the_row_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.seq_len is 5; allowed: 4"):
        Samples(Memory(np.arange(40), 5), 5)


def test_a_real_store_gives_the_same_batches_as_memory(tmp_path: Path) -> None:

    tokens = np.random.default_rng(0).integers(0, 256, 5000)
    writer = DatasetWriter(tmp_path / "store", {}, ByteTokenizer(), shard_tokens=777)
    writer.append("train", tokens, np.array([5000]))
    stored = loader(Samples(writer.finish(lambda _: "").splits["train"], 16), 10)
    memory = loader(Samples(Memory(tokens), 16), 10)
    for _ in range(100):
        assert (stored.next().inputs["tokens"] == memory.next().inputs["tokens"]).all()
    stored.close(), memory.close()


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    """In the second shard of a store of which somebody has changed two bytes."""
    writer = DatasetWriter(tmp_path / "store", {}, ByteTokenizer(), shard_tokens=100)
    writer.append("train", np.arange(250) % 250, np.array([250]))
    split = writer.finish(lambda _: "").splits["train"]
    assert Samples(split, 16).batch(np.arange(15), np.zeros(15, np.int64)).num_targets == 15 * 16
    with (tmp_path / "store" / "train_00001.bin").open("r+b") as file:
        file.seek(2 * 37)
        file.write((257).to_bytes(2, "little"))
    wrong = rf"^{tmp_path}/store/train_00001.bin, token 37, is 257; allowed: ids below 257, the vocabulary"
    with pytest.raises(UserError, match=wrong):
        Samples(split, 16).batch(np.arange(15), np.zeros(15, np.int64))
    batches = BatchLoader(SplitStream(Samples(split, 16), 7), 15, 0)
    with pytest.raises(UserError, match=wrong):
        batches.next()
    batches.close()
