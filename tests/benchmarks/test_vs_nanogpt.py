"""Whole runs beside a stand-in for nanoGPT, whose model always guesses evenly; and the parts of the comparison."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import vs_nanogpt
from benchmarks.machine import peak_resident_bytes
from benchmarks.resume import checked
from benchmarks.runner import Setup, quantity
from benchmarks.vs_nanogpt import Outcome, compare, peak_memory, product_rate, whole_runs

MODEL = """
import torch
from dataclasses import dataclass
from torch import nn

@dataclass
class GPTConfig:
    vocab_size: int = 65

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, tokens, targets):
        logits = self.bias.expand(*tokens.shape, -1)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""
TRAIN = """
import sys
import torch
from model import GPT, GPTConfig

torch.manual_seed(1337 + 0)
words = dict(word[2:].split("=") for word in sys.argv[2:])
assert open("data/shakespeare_char/train.bin").read() == "as many as 1,003,854"
if words["max_iters"] != "0":
    import os
    os.makedirs(words["out_dir"])
    arguments = {"vocab_size": 65}
    saved = {"model_args": arguments, "model": GPT(GPTConfig(**arguments)).state_dict()}
    torch.save(saved, words["out_dir"] + "/ckpt.pt")
"""
PREPARE = """
text = open("input.txt").read()
open("train.bin", "w").write(f"as many as {len(text) * 9 // 10:,}")
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A checkout with the files that nanoGPT has, as far as they are used."""
    folder = tmp_path / "peer"
    for name, text in {
        "model.py": MODEL,
        "train.py": TRAIN,
        "config/train_shakespeare_char.py": "",
        "data/shakespeare_char/prepare.py": PREPARE,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.torture
def test_whole_runs_are_timed_and_swept_over_the_same_split(
    peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = tmp_path / "text.txt"
    letters = "".join(map(chr, range(48, 48 + 65)))
    text.write_text((letters * 20_000)[:1_115_394])
    (tmp_path / "work").mkdir()
    rows = whole_runs(Setup(tmp_path / "work", quick=True, peer=peer, text=text))
    assert [row.unit for row in rows] == ["s", "s", "nats", "nats", "nats", "s"]
    assert all(f"(nanoGPT to {math.log(65):.3f})" in row.what for row in rows[:2])
    assert all(0 < loss < 2 * math.log(65) for row in rows[2:5] for loss in row.ours)
    assert all("held out" in row.what for row in rows[3:5])
    assert not list(peer.rglob("*.bin")), "the checkout stays as it was"


def test_each_experiment_has_a_row_for_its_time_and_the_long_one_for_its_loss() -> None:
    runs = {"nanoGPT": [Outcome(60.0, 1.9), Outcome(70.0, 1.88)]}
    runs |= {name: [Outcome(6.0 * n, 1.8), Outcome(7.0 * n, 1.7)] for n, name in enumerate(vs_nanogpt.EXPERIMENTS, 1)}
    fast, minute, loss = compare(runs)
    assert fast.ratios == pytest.approx([0.1, 0.1]) and minute.ratios == pytest.approx([0.2, 0.2])
    assert "to loss 1.800, 1.700 (nanoGPT to 1.900, 1.880)" in fast.what
    assert loss.cells()[1] == "1.75 nats" and loss.cells()[-1] == "≤ 1: missed"


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="false failed"):
        checked(["false"], tmp_path)


def test_nats_are_told_to_four_digits() -> None:
    assert [quantity(value, "nats") for value in (1.88012, 0.0123456)] == ["1.88 nats", "0.01235 nats"]


def test_a_rate_is_that_of_the_products_made() -> None:
    assert 1e6 < product_rate(size=64) < 1e15


def test_a_process_that_takes_memory_shows_it(tmp_path: Path) -> None:
    before = peak_resident_bytes()
    taken = torch.ones((before or 0) // 2)  # twice what the process has ever had
    after = peak_resident_bytes()
    assert before is not None and after is not None
    assert after > 0.9 * taken.nbytes > 1.5 * before


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    taken = torch.ones(512 * 2**20)
    assert 2**27 < peak_memory("chunked", tmp_path, "quick") < taken.nbytes
