"""Rows that belong together, such as a chosen and a rejected answer, are never parted or mixed up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cleangpt.data.columns import Column
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import DatasetSource, Samples, SplitStream, validation_batches
from cleangpt.data.mixing import MixedDataset, MixedStream, MixtureSource, training_stream
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError

PAIRS = 15


def written(
    folder: Path, pairs: int = PAIRS, group: tuple[str, ...] = ("chosen", "rejected"), first: int = 0
) -> TokenDataset:
    """Row r is three tokens r + 2 * first, and has that number in a column."""
    writer = DatasetWriter(
        folder, {"kind": "test"}, ByteTokenizer(), row_length=3, masked=True, group=group, shard_tokens=20,
        columns={"row": Column(dtype="int64", role="extra")},
    )  # fmt: skip
    values = np.arange(2 * first, 2 * (first + pairs)).repeat(3)
    for split in ("val", "train"):
        writer.append(
            split, values, np.full(2 * pairs, 3), mask=np.ones(len(values), np.uint8), columns={"row": values}
        )
    dataset = writer.finish(lambda facts: "")
    writer.close()
    return dataset


def stream(dataset: TokenDataset, total: int = 10**4) -> MixedStream:
    return training_stream(MixedDataset([MixtureSource(dataset)]), 2, 7, total)


def rows(batches: list[Any]) -> list[int]:
    return [int(row) for batch in batches for row in batch.inputs["tokens"][:, 0]]


def next_batches(source: DatasetSource, count: int) -> Iterator[Any]:
    yield from (source.next() for _ in range(count))
    source.close()


def test_a_dataset_says_how_its_rows_belong_together(tmp_path: Path) -> None:
    dataset = written(tmp_path / "pairs")
    assert TokenDataset(dataset.folder).group == ("chosen", "rejected")
    assert written(tmp_path / "single", group=()).group == ()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pairs_arrive_in_the_same_order_on_any_number_of_devices(tmp_path: Path, world_size: int) -> None:
    """Each is complete, the chosen answer first, in every micro-batch; an epoch has each pair once."""
    dataset = written(tmp_path / "pairs")
    sources = [DatasetSource(stream(dataset), 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    found = [list(next_batches(source, 15)) for source in sources]
    for batch in (batch for of_rank in found for batch in of_rank):
        assert batch.group == 2
        assert torch.equal(batch.extras["row"][:, 0], batch.inputs["tokens"][:, 0])
        for part in batch.split(2):
            chosen, rejected = part.inputs["tokens"][:, 0].tolist()
            assert chosen % 2 == 0 and rejected == chosen + 1
    order = rows([of_rank[number] for number in range(15) for of_rank in found])
    (alone,) = [rows(list(next_batches(DatasetSource(stream(dataset), 8), 15)))]
    assert order == alone
    epochs = [order[start : start + 2 * PAIRS] for start in range(0, len(order), 2 * PAIRS)]
    assert all(sorted(epoch) == list(range(2 * PAIRS)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("done", range(6))
def test_a_resumed_source_goes_on_with_the_next_pair(tmp_path: Path, done: int) -> None:
    dataset = written(tmp_path / "pairs")
    expected = rows(list(next_batches(DatasetSource(stream(dataset), 6), 10)))
    source = DatasetSource(stream(dataset), 6)
    before = rows([source.next() for _ in range(done)])
    state = source.state_dict()
    source.close()
    resumed = DatasetSource(stream(dataset), 6)
    resumed.load_state_dict(state)
    assert before + rows(list(next_batches(resumed, 10 - done))) == expected


def test_skipped_batches_leave_the_others_as_they_were(tmp_path: Path) -> None:
    dataset = written(tmp_path / "pairs")
    expected = rows(list(next_batches(DatasetSource(stream(dataset), 6), 10)))
    source = DatasetSource(stream(dataset), 6)
    source.skip(12, 24)
    assert rows(list(next_batches(source, 8))) == expected[:12] + expected[24:]
    metrics = source.metrics()
    assert metrics["times_visited"] == pytest.approx(48 / 30)
    visited = len(set(expected[:12] + expected[24:]))
    assert metrics["visited_share"] == pytest.approx(visited / 30)


def test_a_mixture_interleaves_whole_pairs_by_weight(tmp_path: Path) -> None:
    sources = [
        MixtureSource(written(tmp_path / "one"), "one", 3.0, max_epochs=2),
        MixtureSource(written(tmp_path / "two", first=PAIRS), "two", 1.0),
    ]
    mixed = training_stream(MixedDataset(sources), 2, 7, 400)
    found = rows([mixed.batch(start, 8) for start in range(0, 400, 8)])
    chosen, rejected = found[::2], found[1::2]
    assert all(row % 2 == 0 for row in chosen) and rejected == [row + 1 for row in chosen]
    assert sum(row < 2 * PAIRS for row in chosen[:40]) == 30  # three of four, until its two epochs are over
    assert sum(row < 2 * PAIRS for row in chosen) == 2 * PAIRS
    assert mixed.progress(400)["times_visited/one"] == 2.0


def test_sources_of_a_mixture_must_agree_on_what_belongs_together(tmp_path: Path) -> None:
    sources = [
        MixtureSource(written(tmp_path / "one"), "one"),
        MixtureSource(written(tmp_path / "two", group=()), "two"),
    ]
    with pytest.raises(UserError, match="group rows differently"):
        MixedDataset(sources)


@pytest.mark.parametrize("limit", [None, 10])
def test_validation_keeps_pairs_together(tmp_path: Path, limit: int | None) -> None:
    """In batches of the same size, of which the last may be filled up by pairs without targets."""
    samples = Samples(written(tmp_path / "pairs").splits["val"], 2)
    batches = [list(validation_batches(samples, 4, limit, rank=rank, world_size=2)) for rank in (0, 1)]
    kept = []
    for batch in (batch for of_rank in batches for batch in of_rank):
        chosen, rejected = batch.inputs["tokens"][::2, 0], batch.inputs["tokens"][1::2, 0]
        assert len(batch) == 4 and torch.equal(rejected, chosen + 1) and not (chosen % 2).any()
        counted = (batch.targets >= 0).any(dim=-1)
        assert torch.equal(counted[::2], counted[1::2])
        kept += batch.inputs["tokens"][counted, 0].tolist()
    assert len(kept) == len(set(kept)) == (limit or 2 * PAIRS)


def test_a_dataset_with_half_a_pair_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "pairs").folder
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"rejected"\n', '"rejected", "worst", "other"\n'))
    with pytest.raises(UserError, match="in groups of 4"):
        TokenDataset(folder)


def test_one_stream_alone_shuffles_groups(tmp_path: Path) -> None:
    alone = SplitStream(Samples(written(tmp_path / "pairs").splits["train"], 2), 7)
    assert rows([alone.batch(0, PAIRS)]) == rows([stream(written(tmp_path / "again")).batch(0, 2 * PAIRS)])
