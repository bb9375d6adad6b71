"""Every benchmark measures what it says: its parts against independent references, and the whole in quick mode."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks import __main__ as command
from benchmarks import made
from benchmarks.loader import Windows, batch_loader, data_loader, random_windows
from benchmarks.made import make_store, make_trainer, shipped, train_macro_batch
from benchmarks.resume import call
from benchmarks.snapshot import plain_write, tensors_of, trained_state
from benchmarks.step import bare_loop, nanogpt_loop
from benchmarks.store import token_files
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.training.resolve import resolve

UINT16 = np.dtype("<u2")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of PyTorch, here and in other processes: threads that wait for each other crawl on a machine that is busy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A file of the tokens 0, 1, 2 … 999: a window tells where it is from."""
    path = tmp_path / "counted.bin"
    path.write_bytes(np.arange(1000, dtype=UINT16).tobytes())
    return path


MARKS = {
    "step": [], "snapshot": [], "loader": pytest.mark.torture, "parallel": pytest.mark.torture,
    "vs_nanogpt": pytest.mark.torture,
}  # fmt: skip
"""When a benchmark's test runs, where that is not with the slow tests."""


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.default(1)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in command.BENCHMARKS],
)
def test_a_benchmark_gives_a_table_of_positive_figures_and_leaves_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "RESULTS.md")
    assert command.main([name, "--quick", "--folder", str(tmp_path / "work")]) == 0
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) >= 2 and all(len(cells) >= 5 for cells in table)
    for what, ours, peer, ratio, spread, *_ in table[1:]:
        figures = [ours.split()[0], peer.rpartition(": ")[2].split()[0], ratio, *spread.split(" to ")]
        assert all(float(figure) > 0 for figure in figures), (what, figures)
    assert not command.RESULTS.exists()
    assert list((tmp_path / "work").iterdir()) == []


# Its parts -----------------------------------------------------------------------------------------------------------


def test_a_made_store_is_random_where_written_and_zero_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "SHARD_TOKENS", 1_200_000)
    store = make_store(tmp_path / "store", 3_000_000)
    train = store.splits["train"]
    assert train.tokens == 3_000_000
    assert [path.stat().st_size // 2 for path in token_files(store.folder)] == [1_200_000, 1_200_000, 600_000, 10_000]
    counts = np.bincount(train.read(0, 1_000_000), minlength=65)
    assert len(counts) == 65 and np.abs(counts - 1_000_000 / 65).max() < 1000
    assert not train.read(1_000_000, 2_000_000).any()


def test_random_windows_lie_in_the_file_and_targets_are_one_on(counted: Path) -> None:
    torch.manual_seed(0)
    inputs, targets = random_windows(counted, UINT16, 500, 8)
    assert inputs.shape == targets.shape == (500, 8) and inputs.dtype == torch.int64
    assert_close(inputs - inputs[:, :1], torch.arange(8).repeat(500, 1))
    assert_close(targets, inputs + 1)
    assert len(inputs[:, 0].unique()) > 200 and targets.max() <= 999


def test_the_windows_of_the_data_loader_meet_without_gap_and_come_again_each_epoch(counted: Path) -> None:
    windows = Windows(counted, UINT16, 9)
    assert len(windows) == 111
    batches = list(islice(data_loader(windows, 37, workers=0), 6))
    for epoch in (batches[:3], batches[3:]):
        starts = torch.cat([inputs[:, 0] for inputs, _ in epoch])
        assert starts.sort().values.tolist() == list(range(0, 999, 9)) and starts.tolist() != sorted(starts.tolist())
    assert all((targets == inputs + 1).all() for inputs, targets in batches)


@pytest.mark.slow
def test_the_data_loader_works_in_other_processes(counted: Path) -> None:
    batches = list(islice(data_loader(Windows(counted, UINT16, 9), 37, workers=2), 3))
    assert sorted(torch.cat([inputs[:, 0] for inputs, _ in batches]).tolist()) == list(range(0, 999, 9))


@pytest.mark.slow
def test_the_bare_loop_trains_what_the_trainer_trains(tmp_path: Path) -> None:
    """Otherwise their times could not be compared."""
    store = make_store(tmp_path / "store", 10_000)
    experiment = shipped("shakespeare_char_cpu", training={"batches_per_macro_batch": 5, "device": "cpu"})
    trainer = make_trainer(experiment, store, tmp_path / "run")
    loader = batch_loader(store, 12, 64)
    batches = [(batch.inputs["tokens"], batch.targets) for batch in (loader.next() for _ in range(5))]
    loader.close()
    experiment = resolve(experiment, store.vocab_size)
    model = build_model(experiment.model)
    model.load_state_dict(trainer.model.state_dict())
    seconds, waited = train_macro_batch(trainer)
    made.close(trainer)
    assert bare_loop(experiment, model, batches)(5) > 0 and seconds > waited > 0
    assert trainer.position.step == 5
    assert_close(model.state_dict(), trainer.model.state_dict(), rtol=0, atol=2e-5)


def test_a_peer_that_is_no_nanogpt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--peer is .*; allowed: a checkout of nanoGPT, with a model\.py"):
        nanogpt_loop(tmp_path, shipped("shakespeare_char_cpu"), [])


def test_the_plain_write_holds_every_byte_of_the_state(tmp_path: Path) -> None:
    state = trained_state(layers=1, dim=8)
    parameters = sum(tensor.numel() for tensor in state["model"].values())
    tensors = list(tensors_of(state))
    plain_write(tmp_path / "plain.bin", tensors)
    moments = [tensor for tensor in tensors if tensor.dim()]
    assert sum(tensor.numel() for tensor in moments) == 3 * parameters + len(state["optimizer"]["skipped"])
    assert (tmp_path / "plain.bin").read_bytes() == b"".join(tensor.numpy().tobytes() for tensor in tensors)


@pytest.mark.slow
def test_a_command_that_fails_or_makes_no_step_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="no step was taken"):
        call("benchmarks.first_step", "--version")
