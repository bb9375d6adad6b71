"""Batches of a mixture hold each dataset's own samples, each once an epoch, on any number of devices."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.batch import IGNORED
from cleangpt.data.columns import Column
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import DatasetSource, Samples, SplitStream
from cleangpt.data.mixing import (
    MixedDataset,
    MixedStream,
    MixtureSource,
    Weight,
    interleave,
    mean_shares,
    split_samples,
    training_stream,
)
from cleangpt.data.modalities import Modalities
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, ModalityTokenizer, Tokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError

ROW = 5


class Rows:
    """A split of `count` rows in memory; every token tells its source and its row."""

    row_length, masked, vocab_size, columns, records, group = ROW, False, 2**62, {}, {}, 1

    def __init__(self, source: int, count: int) -> None:
        self.documents, self.tokens = count, ROW * count
        self.array = np.repeat(1000 * source + np.arange(count), ROW)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.array[start : start + length]


def stream(sizes: list[int], weights: list[float], total: int = 10**6) -> MixedStream:
    names = [f"s{source}" for source in range(len(sizes))]
    streams = {name: SplitStream(Samples(Rows(i, sizes[i]), ROW - 1), i) for i, name in enumerate(names)}
    return MixedStream(streams, interleave(names, weights, [None] * len(sizes), total))


def read(mixture: MixedStream, start: int, count: int) -> list[int]:
    """The first token of each sample."""
    return mixture.batch(start, count).inputs["tokens"][:, 0].tolist()


three = st.tuples(
    st.lists(st.integers(10, 40), min_size=3, max_size=3), st.lists(st.integers(1, 9), min_size=3, max_size=3)
)


@given(mixture=three, batch_size=st.integers(10, 50))
@settings(max_examples=8, derandomize=True)
def test_every_epoch_of_every_source_has_each_of_its_samples_once(
    mixture: tuple[list[int], list[int]], batch_size: int
) -> None:
    sizes, weights = mixture
    mixed = stream(sizes, list(map(float, weights)))
    drawn = [token for start in range(0, 240, batch_size) for token in read(mixed, start, batch_size)]
    for source, size in enumerate(sizes):
        mine = [token - 1000 * source for token in drawn if token // 1000 == source]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(mixture=three, position=st.integers(0, 100), count=st.integers(1, 60))
@settings(max_examples=8, derandomize=True)
def test_a_batch_anywhere_is_that_of_a_replay(mixture: tuple[list[int], list[int]], position: int, count: int) -> None:
    sizes, weights = mixture
    replayed, jumped = (stream(sizes, list(map(float, weights))) for _ in range(2))
    expected = [token for start in range(position + count) for token in read(replayed, start, 1)][position:]
    assert read(jumped, position, count) == expected


@given(mixture=three, position=st.integers(0, 500))
@settings(max_examples=8, derandomize=True)
def test_the_visited_share_is_that_of_counting(mixture: tuple[list[int], list[int]], position: int) -> None:
    sizes, weights = mixture
    mixed = stream(sizes, list(map(float, weights)))
    drawn = read(mixed, 0, position) if position else []
    figures = mixed.progress(position)
    assert figures["visited_share"] == pytest.approx(len(set(drawn)) / sum(sizes))
    assert figures["times_visited"] == pytest.approx(position / sum(sizes))
    for source, size in enumerate(sizes):
        mine = [token for token in drawn if token // 1000 == source]
        assert figures[f"visited_share/s{source}"] == pytest.approx(len(set(mine)) / size)
        assert figures[f"times_visited/s{source}"] == pytest.approx(len(mine) / size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_devices_share_out_the_batches_of_a_mixture(world_size: int) -> None:
    expected = stream([30, 20, 7], [5.0, 3.0, 2.0])
    parts = []
    for rank in range(world_size):
        source = DatasetSource(stream([30, 20, 7], [5.0, 3.0, 2.0]), 8, rank=rank, world_size=world_size)
        source.load_state_dict({"samples": 16, "skipped_ranges": []})
        with closing(source):
            parts.append([source.next().inputs["tokens"] for _ in range(3)])
    for number, start in enumerate((16, 24, 32)):
        assert torch.cat([part[number] for part in parts])[:, 0].tolist() == read(expected, start, 8)


# From datasets on disk ---------------------------------------------------------------------------------------------


def made(
    folder: Path,
    tokens: int,
    tokenizer: Tokenizer | None = None,
    row_length: int | None = None,
    columns: dict[str, Column] | None = None,
) -> TokenDataset:
    """Ids count up to 250; every column has twice the id of its token."""
    writer = DatasetWriter(
        folder, {}, tokenizer or ByteTokenizer(), row_length=row_length, masked=row_length is not None, columns=columns
    )
    lengths = np.full(tokens // row_length, row_length) if row_length else np.array([tokens])
    ids = np.arange(tokens) % 250
    values = dict.fromkeys(columns or {}, 2 * ids)
    for split in ("train", "val"):
        writer.append(split, ids, lengths, mask=np.tile([0, 1], tokens // 2), text_bytes=tokens, columns=values)
    return writer.finish(lambda _: "")


def mixture(
    *sources: tuple[TokenDataset, Weight] | tuple[TokenDataset, Weight, int], error_on_exhaustion: bool = False
) -> MixedDataset:
    """Sources s0, s1, … from dataset, weight and perhaps max_epochs."""
    named = [MixtureSource(dataset, f"s{number}", *rest) for number, (dataset, *rest) in enumerate(sources)]
    return MixedDataset(named, error_on_exhaustion)


def test_shorter_rows_are_padded_and_their_masks_kept(tmp_path: Path) -> None:
    rows, text = made(tmp_path / "rows", 60, row_length=6), made(tmp_path / "text", 400)
    mixed = training_stream(mixture((rows, 1.0), (text, 1.0)), 8, 1, 100)
    batch = mixed.batch(0, 2)
    assert batch.inputs["tokens"].shape == batch.targets.shape == (2, 8)
    (padded,) = [row for row in batch.targets.tolist() if IGNORED in row]
    assert padded[5:] == [IGNORED] * 3
    assert [target == IGNORED for target in padded[:5]] == [False, True, False, True, False]
    assert batch.num_targets == 8 + 3


def test_rows_that_are_too_long_are_refused_in_one_line(tmp_path: Path) -> None:
    mixed = mixture((made(tmp_path / "rows", 60, row_length=6), 1.0))
    with pytest.raises(UserError, match=r"data.seq_len is 4; allowed: 5 or more, the corpus's row length - 1"):
        split_samples(mixed, "train", 4)


def test_different_tokenizers_are_refused_in_one_line(tmp_path: Path) -> None:
    other = CharTokenizer("".join(map(chr, range(300, 600))))
    parts = (made(tmp_path / "a", 100), 1.0), (made(tmp_path / "b", 100, other), 1.0)
    with pytest.raises(UserError, match=r"the sources s0 and s1 have different tokenizers; allowed: one for all"):
        mixture(*parts)


def test_a_run_in_which_a_source_ends_is_refused_where_asked(tmp_path: Path) -> None:
    parts = (made(tmp_path / "a", 100), 1.0, 2), (made(tmp_path / "b", 1000), 1.0)
    # 100 tokens are 9 training samples of 10; the 18th sample of every second position is the last of two epochs.
    training_stream(mixture(*parts, error_on_exhaustion=True), 10, 1, 35)
    with pytest.raises(UserError, match=r"the source s0 ends after 3[56] of the run's 40 samples; allowed: a larger"):
        training_stream(mixture(*parts, error_on_exhaustion=True), 10, 1, 40)
    shared = training_stream(mixture(*parts), 10, 1, 200)
    assert shared.progress(200)["times_visited/s0"] == 2


def test_mean_shares_are_those_of_the_weights_over_the_run(tmp_path: Path) -> None:
    one = made(tmp_path / "a", 100)
    assert mean_shares(MixedDataset([MixtureSource(one)])) == {"": 1.0}
    assert mean_shares(mixture((one, 3.0, 1), (one, 1.0))) == pytest.approx({"s0": 0.75, "s1": 0.25})
    rising, falling = ((0.0, 0.0), (1.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))
    assert mean_shares(mixture((one, rising), (one, falling))) == pytest.approx({"s0": 0.5, "s1": 0.5})


def test_columns_are_mixed_with_their_tokens(tmp_path: Path) -> None:
    columns = {"place": Column(dtype="uint16", role="input"), "reward": Column(dtype="float32", role="extra")}
    one, two = (made(tmp_path / name, 200, columns=columns) for name in ("a", "b"))
    batch = training_stream(mixture((one, 1.0), (two, 2.0)), 8, 1, 100).batch(0, 30)
    assert (batch.inputs["place"] == 2 * batch.inputs["tokens"]).all()
    assert (batch.extras["reward"] == 2 * batch.targets).all()


def test_different_columns_are_refused_in_one_line(tmp_path: Path) -> None:
    reward = Column(dtype="float32", role="extra")
    one, two = made(tmp_path / "a", 100, columns={"reward": reward}), made(tmp_path / "b", 100)
    wrong = r"s0 and s1 have different columns, reward \(float32, extra\) and none; allowed: the same for all"
    with pytest.raises(UserError, match=wrong):
        mixture((one, 1.0), (two, 1.0))


def test_an_input_that_a_source_lacks_is_zero_there(tmp_path: Path) -> None:
    place = Column(dtype="uint16", role="input")
    one, two = made(tmp_path / "a", 200, columns={"place": place}), made(tmp_path / "b", 200)
    for parts in (((one, 1.0), (two, 1.0)), ((two, 1.0), (one, 1.0))):
        mixed = mixture(*parts)
        places = training_stream(mixed, 8, 1, 100).batch(0, 40).inputs["place"]
        lacking = (places == 0).all(dim=1)
        assert mixed.columns == {"place": place} and lacking.sum() == 20 and (places[~lacking] > 0).any(dim=1).all()


def test_text_alone_mixes_with_text_and_values_of_the_same_tokens(tmp_path: Path) -> None:
    values = ModalityTokenizer(ByteTokenizer(), Modalities())
    text, both = made(tmp_path / "a", 100, ByteTokenizer()), made(tmp_path / "b", 100, values)
    for parts in (((text, 1.0), (both, 1.0)), ((both, 1.0), (text, 1.0))):
        assert mixture(*parts).tokenizer.to_json() == values.to_json()
    other = made(tmp_path / "c", 100, ModalityTokenizer(ByteTokenizer(), Modalities(bins=8)))
    with pytest.raises(UserError, match="different tokenizers"):
        mixture((other, 1.0), (both, 1.0))


def test_a_corpus_on_its_own_is_a_mixture_of_one_without_a_name(tmp_path: Path) -> None:
    """Its samples are those of its split, and its metrics have no name."""
    dataset = made(tmp_path / "a", 300)
    stream = training_stream(MixedDataset([MixtureSource(dataset)]), 8, 5, 1000)
    plain = SplitStream(Samples(dataset.splits["train"], 8), 5)
    assert (stream.batch(30, 40).inputs["tokens"] == plain.batch(30, 40).inputs["tokens"]).all()
    assert stream.progress(20, [[8, 12]]) == plain.progress(20, [[8, 12]])
