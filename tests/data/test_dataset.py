"""A dataset gives back every token that was written, across shards, and shows damage."""

import itertools
import json
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cleangpt.data.columns import Column
from cleangpt.data.dataset import CARD, DATASET, TokenDataset
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError
from cleangpt.files import PARTIAL, find_corruption

BYTES = ByteTokenizer()


def writer(folder: Path, tokenizer: Tokenizer = BYTES, **options: Any) -> DatasetWriter:
    return DatasetWriter(folder, {"kind": "made"}, tokenizer, **options)


def finish(made: DatasetWriter) -> TokenDataset:
    return made.finish(lambda facts: f"# card of {len(facts['splits'])} splits\n")


def ids(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


@settings(max_examples=15, derandomize=True)
@given(
    documents=st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=9), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 10),
    data=st.data(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    cuts: list[int],
    shard_tokens: int,
    data: st.DataObject,
) -> None:
    """Whatever the shard size, and however the documents are cut over the calls of `append`."""
    made = writer(tmp_path_factory.mktemp("store") / "s", shard_tokens=shard_tokens)
    tokens = np.concatenate(documents).astype(np.int64)
    ends = np.cumsum([len(document) for document in documents])
    at, turn = 0, 0
    while at < len(tokens):
        stop = min(at + cuts[turn % len(cuts)], len(tokens))
        ended = ends[(ends > at) & (ends <= stop)]
        made.append("train", tokens[at:stop], np.diff(ended, prepend=at), text_bytes=stop - at)
        at, turn = stop, turn + 1
    split = finish(made).splits["train"]
    lengths = [len(document) for document in documents]
    assert split.read(0, split.tokens).tolist() == tokens.tolist()
    starts = np.fromfile(made.folder / "train_documents.bin", "<u8")
    assert starts.tolist() == (ends - lengths).tolist()
    assert (split.tokens, split.documents, split.text_bytes) == (len(tokens), len(documents), len(tokens))
    start = data.draw(st.integers(0, len(tokens)))
    length = data.draw(st.integers(0, len(tokens) - start))
    assert split.read(start, length).tolist() == tokens[start : start + length].tolist()
    facts = json.loads((made.folder / DATASET).read_text(encoding="utf-8"))["splits"]["train"]
    assert facts["longest_document"] == max(lengths)
    assert {int(power): count for power, count in facts["length_histogram"].items()} == {
        power: sum(2**power <= length < 2 ** (power + 1) for length in lengths)
        for power in {length.bit_length() - 1 for length in lengths}
    }


def test_a_mask_lies_beside_its_tokens(tmp_path: Path) -> None:
    made = writer(tmp_path / "s", row_length=4, masked=True, shard_tokens=6)
    mask = np.array([0, 1, 1, 0, 1, 1, 0, 0], np.uint8)
    made.append("train", np.arange(8), ids(4, 4), mask=mask)
    split = finish(made).splits["train"]
    assert (split.masked, split.row_length) == (True, 4)
    assert split.read_mask(1, 7).tolist() == mask[1:].tolist()
    assert not (tmp_path / "s" / "train_documents.bin").exists()


NUMBERS = {
    "uint8": [0, 255, 3],
    "uint16": [0, 65_535, 3],
    "int64": [-(2**63), 2**63 - 1, 3],
    "float32": [-0.5, 3e38, float("inf")],
}


def test_columns_of_every_dtype_are_read_back_across_shards(tmp_path: Path) -> None:
    columns = {dtype: Column(dtype=dtype, role="input") for dtype in NUMBERS}  # type: ignore[arg-type]
    made = writer(tmp_path / "s", columns=columns, shard_tokens=2)
    made.append("train", ids(1, 2, 3), ids(3), columns={name: np.array(values) for name, values in NUMBERS.items()})
    dataset = finish(made)
    assert dataset.columns == dataset.splits["train"].columns == columns
    for name, values in NUMBERS.items():
        expected = np.array(values, name)
        assert dataset.splits["train"].read_column(name, 0, 3).tolist() == expected.tolist()
        assert dataset.splits["train"].read_column(name, 1, 1).dtype == expected.dtype
    assert {"train_00000.uint8.bin", "train_00001.int64.bin"} <= dataset.description["sha256"].keys()
    (tmp_path / "s" / "train_00001.uint16.bin").unlink()
    with pytest.raises(UserError, match=r"train_00001.uint16.bin is missing; run cleangpt prepare --again"):
        TokenDataset(tmp_path / "s")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "the columns appended are none; allowed: those of the dataset, place"),
        ({"plaice": [1, 2]}, "the columns appended are plaice; allowed: those of the dataset, place"),
        ({"place": [1]}, r"the column place has values \(1,\); allowed: one per token, \(2,\)"),
        ({"place": [1, 256]}, "the column place has int64 from 1 to 256; allowed: whole numbers from 0 to 255, which"),
        ({"place": [-1, 2]}, "the column place has int64 from -1 to 2; allowed: whole numbers from 0 to 255, which"),
        ({"place": [0.5, 2]}, "the column place has float64 from 0.5 to 2.0; allowed: whole numbers from 0 to 255"),
    ],
)
def test_columns_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, values: Any, message: str) -> None:
    made = writer(tmp_path / "s", columns={"place": Column(dtype="uint8", role="input")})
    with pytest.raises(UserError, match=f"^{message}"):
        made.append("train", ids(1, 2), ids(2), columns=values and {k: np.array(v) for k, v in values.items()})
    made.close()


@pytest.mark.parametrize("name", ["tokens", "targets", "mask", "a place", "../place", ""])
def test_a_column_is_named_by_an_identifier_that_means_nothing_yet(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^a column is named .*; allowed: an identifier other than tokens, targets"):
        writer(tmp_path / "s", columns={name: Column(dtype="uint8", role="input")})


def test_a_column_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a column's dtype is 'float64'; allowed: uint8, uint16, int64, float32$"):
        Column(dtype="float64", role="input")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^a column's role is 'target'; allowed: input, extra$"):
        Column(dtype="uint8", role="target")  # type: ignore[arg-type]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_take_two_bytes_where_they_fit(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    tokenizer = CharTokenizer("".join(map(chr, [*range(0xD800), *range(0xE000, vocabulary + 0x800)])))
    assert tokenizer.vocab_size == vocabulary
    made = writer(tmp_path / "s", tokenizer)
    made.append("train", ids(0, vocabulary - 1), ids(2))
    store = finish(made)
    assert store.splits["train"].read(0, 2).tolist() == [0, vocabulary - 1]
    assert (store.description["dtype"], store.vocab_size) == (dtype, vocabulary)


def test_splits_come_in_the_order_of_the_words(tmp_path: Path) -> None:
    made = writer(tmp_path / "s")
    for name in ("test", "val", "train"):
        made.append(name, ids(1), ids(1))
    assert list(finish(made).splits) == ["train", "val", "test"]


def test_reading_maps_and_does_not_copy(tmp_path: Path) -> None:
    made = writer(tmp_path / "s")
    made.append("train", np.arange(100), ids(100))
    part = finish(made).splits["train"].read(10, 50)
    while isinstance(part, np.ndarray):
        assert not part.flags.owndata
        part = part.base
    assert isinstance(part, memoryview) and isinstance(part.obj, mmap.mmap)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_the_system_reads_ahead_in_what_is_validated_and_not_in_what_is_shuffled(tmp_path: Path) -> None:
    made = writer(tmp_path / "s")
    made.append("train", np.arange(100), ids(100))
    made.append("val", np.arange(100), ids(100))
    store = finish(made)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = {}
    for mapping, after in itertools.pairwise(mappings):
        if found := re.search(rf"{store.folder}/(\w+)\.bin", mapping):
            flags[found[1]] = after.splitlines()[0].split()
    assert {name.split("_")[0]: "rr" in words for name, words in flags.items()} == {"train": True, "val": False}


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 4), (4, 0), (3, 1), (1, -1)])
def test_reading_outside_is_refused(tmp_path: Path, start: int, length: int) -> None:
    made = writer(tmp_path / "s")
    made.append("train", ids(1, 2, 3), ids(3))
    with pytest.raises(IndexError):
        finish(made).splits["train"].read(start, length)


def test_nothing_stands_before_the_end(tmp_path: Path) -> None:
    made = writer(tmp_path / "s")
    made.append("train", ids(1, 2), ids(2))
    made.commit(1)
    assert not (tmp_path / "s").exists()
    store = finish(made)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert (store.folder / CARD).read_text(encoding="utf-8") == "# card of 1 splits\n"
    assert find_corruption(store.folder) == ""
    store.verify()


def test_an_unended_document_is_not_sealed(tmp_path: Path) -> None:
    made = writer(tmp_path / "s")
    made.append("train", ids(1, 2, 3), ids(2))
    with pytest.raises(ValueError, match="not ended"):
        finish(made)
    assert not (tmp_path / "s").exists()


@settings(max_examples=10, derandomize=True)
@given(appends=st.lists(st.integers(1, 9), min_size=2, max_size=12), shard_tokens=st.integers(1, 12), data=st.data())
def test_an_interrupted_writer_goes_on_at_its_commit(
    tmp_path_factory: pytest.TempPathFactory, appends: list[int], shard_tokens: int, data: st.DataObject
) -> None:
    """The first writer stops anywhere after a commit; the files end as if there had been one writer."""
    folder = tmp_path_factory.mktemp("store")
    committed = data.draw(st.integers(0, len(appends)))
    stopped = data.draw(st.integers(committed, len(appends)))

    def append(made: DatasetWriter, first: int, last: int) -> None:
        for index in range(first, last):
            length = appends[index]
            tokens, ended = np.arange(length) + index, ids(*([length - 1] if length > 1 and index else []))
            made.append("train", tokens, ended, columns={"reward": tokens / 2})

    columns = {"reward": Column(dtype="float32", role="extra")}
    whole = writer(folder / "whole", shard_tokens=shard_tokens, columns=columns)
    append(whole, 0, len(appends))
    last = {"reward": np.array([0.5])}
    whole.append("train", ids(7), ids(1), columns=last)
    first = writer(folder / "parts", shard_tokens=shard_tokens, columns=columns)
    append(first, 0, committed)
    first.commit(committed)
    append(first, committed, stopped)
    first.close()
    second = writer(folder / "parts", shard_tokens=shard_tokens, columns=columns)
    assert second.position == committed
    append(second, committed, len(appends))
    second.append("train", ids(7), ids(1), columns=last)
    one, two = finish(whole), finish(second)
    assert one.description["sha256"] == two.description["sha256"]
    assert one.description["splits"] == two.description["splits"]
    train = two.splits["train"]
    rewards = train.read_column("reward", 0, train.tokens - 1)
    assert (rewards == train.read(0, train.tokens - 1) / 2).all()


def interrupted(folder: Path) -> None:
    made = writer(folder, source="a")
    made.append("train", ids(1, 2, 3), ids(3))
    made.commit(5)
    made.close()


def test_another_source_or_tokenizer_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "s")
    assert writer(tmp_path / "s", source="a").position == 5
    assert writer(tmp_path / "s", source="b").position == 0
    assert not list((tmp_path / f"s{PARTIAL}").glob("*.bin"))
    interrupted(tmp_path / "t")
    assert writer(tmp_path / "t", CharTokenizer("ab"), source="a").position == 0


def test_lost_data_or_a_broken_journal_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "s")
    (tmp_path / f"s{PARTIAL}" / "train_00000.bin").write_bytes(b"\0")
    assert writer(tmp_path / "s", source="a").position == 0
    interrupted(tmp_path / "t")
    (tmp_path / f"t{PARTIAL}" / "journal.json").write_text("{", encoding="utf-8")
    assert writer(tmp_path / "t", source="a").position == 0


def small_store(folder: Path) -> TokenDataset:
    made = writer(folder)
    made.append("train", ids(1, 2, 3), ids(3))
    return finish(made)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    (store.folder / "train_00000.bin").write_bytes(b"\1\0\2\0\4\0")
    with pytest.raises(UserError, match=r"train_00000\.bin has changed"):
        store.verify()


def test_a_cut_missing_or_foreign_store_is_one_line(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    (store.folder / "train_00000.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(UserError, match="has 4 bytes, not 6"):
        TokenDataset(store.folder)
    (store.folder / "train_00000.bin").unlink()
    with pytest.raises(UserError, match="is missing"):
        TokenDataset(store.folder)
    facts = json.loads((store.folder / DATASET).read_text(encoding="utf-8"))
    (store.folder / DATASET).write_text(json.dumps(facts | {"format": 99}), encoding="utf-8")
    with pytest.raises(UserError, match="has dataset format 99; this version reads 2; run cleangpt prepare --again"):
        TokenDataset(store.folder)
    with pytest.raises(UserError, match="not a dataset"):
        TokenDataset(tmp_path)


def test_a_dataset_of_the_first_format_is_refused_in_one_line(tmp_path: Path) -> None:
    """It described itself in store.json."""
    (tmp_path / "store.json").write_text('{"format": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"has dataset format 1; this version reads 2; run cleangpt prepare --again$"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 257, 65_536 + 5])
def test_an_id_beyond_the_vocabulary_is_refused_when_it_is_written(tmp_path: Path, wrong: int) -> None:
    """65,541 would be 5 in two bytes."""
    made = writer(tmp_path / "s")
    made.append("train", ids(1, 2, 256), ids(3))
    with pytest.raises(UserError, match=rf"^token 4 of the split train would be {wrong}; allowed: ids below 257, the"):
        made.append("train", ids(3, wrong, 4), ids(3))
    made.close()


def made_store(folder: Path) -> TokenDataset:
    made = writer(folder)
    for split in ("train", "val"):
        made.append(split, np.arange(250), ids(250))
    return finish(made)


def test_a_fingerprint_is_that_of_the_same_files_wherever_and_whenever_they_were_made(tmp_path: Path) -> None:
    one, two = made_store(tmp_path / "one"), made_store(tmp_path / "two")
    assert one.fingerprint()["sha256"] == two.fingerprint()["sha256"]
    assert set(one.fingerprint()["sha256"]) >= {"train_00000.bin", "val_documents.bin", "tokenizer.json"}
    two.check_same(one.fingerprint())


def test_a_file_changed_in_place_is_found_by_its_time_and_its_checksum(tmp_path: Path) -> None:
    store = made_store(tmp_path / "s")
    before = store.fingerprint()
    path = tmp_path / "s" / "train_00000.bin"
    content = path.read_bytes()
    path.write_bytes(content)
    store.check_same(before)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train_00000.bin has changed since it was prepared; run cleangpt prepare"):
        store.check_same(before)


def test_only_files_with_another_time_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cleangpt.data import dataset as room

    made, read = made_store(tmp_path / "s"), []
    before = made.fingerprint()
    sha256 = room.sha256
    monkeypatch.setattr(room, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    made.check_same(before)
    assert read == ["tokenizer.json"]
    (tmp_path / "s" / "val_00000.bin").touch()
    made.check_same(before)
    assert read == ["tokenizer.json"] * 2 + ["val_00000.bin"]


@pytest.mark.parametrize("name", ["train_00000.bin", "tokenizer.json"])
def test_another_store_in_its_place_is_refused(tmp_path: Path, name: str) -> None:
    store = made_store(tmp_path / "s")
    before = store.fingerprint()
    before["sha256"][name] = "0" * 64
    with pytest.raises(UserError, match=rf"{name} is not the one that this run started with; prepare the corpus fro"):
        store.check_same(before)


def test_documents_of_no_tokens_are_kept_and_counted(tmp_path: Path) -> None:
    made = writer(tmp_path / "s")
    made.append("train", ids(7, 8), ids(0, 2, 0, 0))
    made.append("train", ids(), ids(0))
    made.append("train", ids(9), ids(1))
    split = finish(made).splits["train"]
    assert (split.documents, split.tokens) == (6, 3)
    assert np.fromfile(tmp_path / "s" / "train_documents.bin", "<u8").tolist() == [0, 0, 2, 2, 2, 2]
