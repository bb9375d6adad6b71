"""Records, such as images, come back with the rows at whose tokens they stand: shuffled, mixed, shared, resumed."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import DatasetSource, Samples, validation_batches
from cleangpt.data.mixing import MixedDataset, MixtureSource, split_samples, training_stream
from cleangpt.data.records import PlacedRecords, Records, no_records, stack_rows
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError
from cleangpt.files import find_corruption

ROW, SHAPE, TOKENS = 8, (2, 3), 2
KIND = Records(dtype="uint8", shape=SHAPE, tokens=TOKENS)


def pictures_of(row: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """Where in a row pictures begin, and what they are: none, one or two of them, told apart by the row's number."""
    starts = [[], [1], [0, 4], [6]][row % 4]
    return [(start, np.full(SHAPE, 10 * row + number, np.uint8)) for number, start in enumerate(starts)]


def placed(rows: range) -> PlacedRecords:
    found = [(number * ROW + start + TOKENS, picture)
             for number, row in enumerate(rows) for start, picture in pictures_of(row)]  # fmt: skip
    values = np.array([picture for _, picture in found], np.uint8).reshape(-1, *SHAPE)
    return PlacedRecords(values, np.array([end for end, _ in found], np.int64))


def writer(folder: Path, kind: Records | None = KIND) -> DatasetWriter:
    records = {} if kind is None else {"images": kind}
    return DatasetWriter(folder, {"kind": "made"}, ByteTokenizer(), row_length=ROW, masked=True, records=records)


def append(made: DatasetWriter, split: str, rows: range, kind: Records | None = KIND) -> None:
    """Rows whose tokens are all the row's number."""
    made.append(
        split, np.repeat(np.array(rows, np.int64), ROW), np.full(len(rows), ROW),
        mask=np.ones(len(rows) * ROW, np.uint8),
        records={} if kind is None else {"images": placed(rows)},
    )  # fmt: skip


def dataset(folder: Path, count: int = 20, kind: Records | None = KIND) -> TokenDataset:
    made = writer(folder, kind)
    for first in range(0, count, 7):  # several calls
        append(made, "train", range(first, min(first + 7, count)), kind)
    append(made, "val", range(count, count + 6), kind)
    return made.finish(lambda facts: "")


def assert_right(batch: Batch) -> None:
    """Every row of a batch has its own pictures, at their places, and otherwise zeros."""
    images, ends = batch.inputs["images"], batch.inputs["images_ends"]
    rows = batch.inputs["tokens"][:, 1].tolist()
    assert images.dtype == torch.uint8 and ends.dtype == torch.int64
    for row, shown, at in zip(rows, images, ends, strict=True):
        expected = pictures_of(row)
        assert at[: len(expected)].tolist() == [start + TOKENS for start, _ in expected]
        assert not at[len(expected) :].any() and not shown[len(expected) :].any()
        for (_, picture), found in zip(expected, shown, strict=False):
            assert (found.numpy() == picture).all()


def test_every_row_of_a_batch_has_its_pictures_at_their_places(tmp_path: Path) -> None:
    samples = Samples(dataset(tmp_path / "d").splits["train"], ROW - 1)
    batch = samples.batch(np.array([2, 0, 7, 2]), np.zeros(4, np.int64))
    assert batch.inputs["images"].shape == (4, 2, *SHAPE)
    assert_right(batch)


def test_rows_without_pictures_bring_none(tmp_path: Path) -> None:
    samples = Samples(dataset(tmp_path / "d").splits["train"], ROW - 1)
    batch = samples.batch(np.array([0, 4, 8]), np.zeros(3, np.int64))
    assert batch.inputs["images"].shape == (3, 0, *SHAPE) and batch.inputs["images_ends"].shape == (3, 0)


def test_a_dataset_without_records_is_written_and_read_as_ever(tmp_path: Path) -> None:
    made = dataset(tmp_path / "d", kind=None)
    assert "records" not in made.description and "records" not in made.description["splits"]["train"]
    assert Samples(made.splits["train"], ROW - 1).batch(np.array([1]), np.zeros(1, np.int64)).inputs.keys() == {
        "tokens"
    }


def test_windows_cut_through_records(tmp_path: Path) -> None:
    """Windows that ignore rows have every record with a token among them, whose end may lie outside."""
    made = DatasetWriter(tmp_path / "d", {"kind": "made"}, ByteTokenizer(), records={"images": KIND})
    ends = [2, 5, 8, 10, 24]
    values = np.arange(len(ends) * 6, dtype=np.uint8).reshape(-1, *SHAPE)
    for split in ("train", "val"):
        made.append(split, np.arange(26), np.array([26]), records={"images": PlacedRecords(values, np.array(ends))})
    split = made.finish(lambda facts: "").splits["val"]
    batch = Samples(split, 4, training=False).batch(np.arange(6), np.zeros(6, np.int64))
    for number, (shown, at) in enumerate(zip(batch.inputs["images"], batch.inputs["images_ends"], strict=True)):
        start = 4 * number
        among = [index for index, end in enumerate(ends) if start < end and end - TOKENS < start + 4]
        assert at[: len(among)].tolist() == [ends[index] - start for index in among]
        assert (shown[: len(among)].numpy() == values[among]).all()


def test_shares_and_micro_batches_have_the_pictures_of_the_whole(tmp_path: Path) -> None:
    """Two processes, each with micro-batches of 2 rows, see what one process sees; a loaded state goes on there."""
    made = MixedDataset([MixtureSource(dataset(tmp_path / "d"))])
    stream = training_stream(made, ROW - 1, 7, 80)
    sources = [DatasetSource(stream, 8, rank=rank, world_size=2) for rank in range(2)]
    sources[1].load_state_dict({"samples": 0, "skipped_ranges": []})
    for start in range(0, 40, 8):
        whole = stream.batch(start, 8)
        assert_right(whole)
        parts = [part for source in sources for part in source.next().split(2)]
        assert torch.cat([part.inputs["tokens"] for part in parts]).equal(whole.inputs["tokens"])
        for part in parts:
            assert_right(part)
    for source in sources:
        source.close()


def test_validation_reads_every_row_with_its_pictures(tmp_path: Path) -> None:
    samples = Samples(dataset(tmp_path / "d").splits["val"], ROW - 1, training=False)
    seen: list[int] = []
    for batch in validation_batches(samples, 4):
        assert_right(batch)
        seen += batch.inputs["tokens"][(batch.targets != IGNORED).any(1), 1].tolist()
    assert sorted(seen) == list(range(20, 26))


def test_a_text_source_is_mixed_with_one_of_pictures(tmp_path: Path) -> None:
    sources = [MixtureSource(dataset(tmp_path / "pictures"), "pictures"),
               MixtureSource(dataset(tmp_path / "text", kind=None), "text")]  # fmt: skip
    mixed = MixedDataset(sources)
    assert mixed.records == {"images": KIND}
    stream = training_stream(mixed, ROW - 1, 3, 40)
    batch = stream.batch(0, 16)
    shown = (batch.inputs["images_ends"] > 0).any(1)
    by_source = torch.from_numpy(stream.interleaving.sources(0, 16))
    assert not shown[by_source == 1].any() and shown[by_source == 0].any()
    assert all("images" in part.batch(np.arange(2), np.zeros(2, np.int64)).inputs
               for part in split_samples(mixed, "val", ROW - 1).values())  # fmt: skip


def test_sources_with_other_records_are_refused(tmp_path: Path) -> None:
    other = dataset(tmp_path / "other", kind=None)
    other.records = {"images": Records(dtype="uint8", shape=(4, 4))}
    with pytest.raises(
        UserError, match=r"sources a and b have different records images, uint8 \(2, 3\) at 2 tokens and"
    ):
        MixedDataset([MixtureSource(dataset(tmp_path / "d"), "a"), MixtureSource(other, "b")])


def test_batches_with_different_numbers_of_pictures_are_concatenated() -> None:
    rows = [{"images": torch.ones(count, *SHAPE), "images_ends": torch.arange(1, count + 1)} for count in (0, 2, 1)]
    batches = [Batch({"tokens": torch.zeros(1, 4), **stack_rows([row])}, torch.zeros(1, 4)) for row in rows]
    together = Batch.cat(batches)
    assert together.inputs["images_ends"].tolist() == [[0, 0], [1, 2], [1, 0]]
    assert together.inputs["images"].sum((1, 2, 3)).tolist() == [0, 12, 6]


def test_an_interrupted_writer_goes_on_after_its_last_commit(tmp_path: Path) -> None:
    whole = dataset(tmp_path / "whole")
    first = writer(tmp_path / "cut")
    append(first, "train", range(7))
    first.commit(1)
    append(first, "train", range(7, 14))  # lost
    first.close()
    second = writer(tmp_path / "cut")
    assert second.position == 1 and second.splits["train"].records == {"images": 7}
    for rows in (range(7, 14), range(14, 20)):
        append(second, "train", rows)
    append(second, "val", range(20, 26))
    assert second.finish(lambda facts: "").description["sha256"] == whole.description["sha256"]


def test_another_kind_of_record_begins_afresh(tmp_path: Path) -> None:
    first = writer(tmp_path / "d")
    append(first, "train", range(7))
    first.commit(1)
    first.close()
    assert writer(tmp_path / "d", Records(dtype="uint8", shape=(3, 2))).position == 0


def test_of_many_pictures_few_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """While they are written, checked, opened and read; files are mapped, and do not count."""
    kind, batch = Records(dtype="uint8", shape=(256, 256), tokens=2), np.zeros((8, 256, 256), np.uint8)
    tracemalloc.start()
    made = writer(tmp_path / "d", kind)
    for split, count in (("val", 1), ("train", 50)):
        for _ in range(count):
            ends = np.arange(8, dtype=np.int64) * ROW + 2
            tokens, mask = np.zeros(8 * ROW, np.int64), np.ones(8 * ROW, np.uint8)
            made.append(split, tokens, np.full(8, ROW), mask=mask, records={"images": PlacedRecords(batch, ends)})
    samples = Samples(made.finish(lambda facts: "").splits["train"], ROW - 1)
    for start in range(0, 400, 8):
        shown = samples.batch(np.arange(start, start + 8), np.zeros(8, np.int64)).inputs["images"]
        assert shown.shape == (8, 1, 256, 256)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50 * batch.nbytes / 5


@pytest.mark.parametrize("name", ["train.images.bin", "train.images_ends.bin"])
def test_damage_is_found(name: str, tmp_path: Path) -> None:
    made = dataset(tmp_path / "d")
    path = made.folder / name
    content = bytearray(path.read_bytes())
    content[3] ^= 255
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=f"{name} has changed since it was prepared"):
        made.verify()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} has [\d,]+ bytes, not [\d,]+; run cleangpt prepare --again"):
        TokenDataset(made.folder)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (PlacedRecords(np.zeros((1, 3, 2), np.uint8), np.array([4])), r"images are uint8 \(1, 3, 2\); allowed: uint8"),
        (PlacedRecords(np.zeros((1, 2, 3)), np.array([4])), r"images are float64"),
        (PlacedRecords(np.zeros((1, 2, 3), np.uint8), np.array([1])), r"images end after \[1\] tokens of 8"),
        (PlacedRecords(np.zeros((1, 2, 3), np.uint8), np.array([9])), r"images end after \[9\] tokens of 8"),
        (PlacedRecords(np.zeros((2, 2, 3), np.uint8), np.array([4, 5])), r"in order, each at 2"),
    ],
)
def test_records_that_do_not_fit_are_refused(records: PlacedRecords, message: str, tmp_path: Path) -> None:
    made = writer(tmp_path / "d")
    with pytest.raises(UserError, match=message):
        made.append("train", np.zeros(ROW, np.int64), np.array([ROW]), mask=np.ones(ROW, np.uint8),
                    records={"images": records})  # fmt: skip


@pytest.mark.parametrize("name", ["tokens", "an image", "images_ends", "mask"])
def test_names_that_would_collide_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="records are named"):
        DatasetWriter(tmp_path / "d", {}, ByteTokenizer(), records={name: KIND})


@pytest.mark.parametrize("entry", [{"dtype": "int8", "shape": [2]}, {"dtype": "uint8", "shape": [0]},
                                   {"dtype": "uint8", "shape": [2], "tokens": 1.5}])  # fmt: skip
def test_a_kind_that_is_none_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Records(**entry)


def test_no_records_at_all() -> None:
    assert len(no_records(KIND)) == 0 and no_records(KIND).read(0, 100).values.shape == (0, *SHAPE)


def test_nothing_was_left_behind(tmp_path: Path) -> None:
    assert not find_corruption(dataset(tmp_path / "d").folder)
