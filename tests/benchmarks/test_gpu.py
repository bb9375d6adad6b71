"""The GPU command: what it measures is kept whatever happens to it; and every row runs on the CPU, at toy size."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu.child import load
from benchmarks.gpu.correct import error_of, experts, loss_chunks, masks, optimizers
from benchmarks.gpu.journal import append, goal, quantity, read, table
from benchmarks.gpu.models import SPEED_ROWS, data_for, speed_experiment
from benchmarks.gpu.peers import function_of
from benchmarks.gpu.policies import grpo_round, losses
from benchmarks.gpu.resume import differing
from benchmarks.gpu.rows import ROWS, Row
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.gpu.synchronisation import READ, STEPS, cases, trace, trainer_of
from benchmarks.made import close
from cleangpt.errors import UserError
from cleangpt.planning.plan import make_plan
from cleangpt.training.launch import check
from tests.benchmarks.gpu_rows import rows, run
from tests.forked import Command

CARD = "cpu, toy sizes"
PEER = {
    "model.py": """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 65
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 4
    dropout: float = 0.0
    bias: bool = False


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scores = nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, tokens, targets):
        logits = self.scores(tokens)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
""",
    "train.py": """
import os, sys
import numpy as np
import torch
from model import GPT, GPTConfig

def get_batch(split):
    data = np.fromfile(os.path.join(data_dir, split + ".bin"), dtype=np.uint16).astype(np.int64)
    rows = torch.from_numpy(np.stack([data[i : i + block_size + 1] for i in range(batch_size)]))
    return rows[:, :-1].to(device), rows[:, 1:].to(device)

assert os.path.exists("data/shakespeare_char/train.bin")
options = dict(word[2:].split("=") for word in sys.argv[2:])
os.makedirs(options["out_dir"])
saved = {"_orig_mod." + name: value for name, value in GPT(GPTConfig()).state_dict().items()}
print("step 0: train loss 4.2000, val loss 4.1000")
print("step 2: train loss 1.4000, val loss 1.3000")
torch.save({"model_args": {"block_size": 8, "vocab_size": 65}, "model": saved}, options["out_dir"] + "/ckpt.pt")
""",
    "config/train_shakespeare_char.py": "",
    "data/shakespeare_char/prepare.py": "open('train.bin', 'w').write(open('input.txt').read())",
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In other processes: threads that wait for each other crawl on a machine that is busy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Where results and temporary files go."""
    return ["--results", str(tmp_path / "gpu.jsonl"), "--folder", str(tmp_path / "work")]


@pytest.fixture
def toy(tmp_path: Path) -> Setup:
    (tmp_path / "row").mkdir()
    return Setup(tmp_path / "row", tmp_path / "gpu.jsonl", CARD, toy=True)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def runs(pid: float) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The command ---------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_takes_no_other_with_it_and_a_second_call_goes_on(
    tmp_path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(rows("quick", "failing", "left_out", "crashing"), words) == 1
    found = read(tmp_path / "gpu.jsonl")[CARD]
    assert {name: outcome.status for name, outcome in found.items()} == {
        "quick": "done", "failing": "failed", "left_out": "left out", "crashing": "failed",
    }  # fmt: skip
    assert found["failing"].reason == "ValueError: broken in two lines"
    assert found["crashing"].reason == "the process ended with exit code -9"
    assert [entry.what for entry in found["crashing"].measurements] == ["before the end"]
    printed = capfd.readouterr().out
    assert "one  1.5 GiB  ≤ 2: met" in printed and "goals missed: quick: two" in printed
    assert "left out: failing (failed: ValueError: broken in two lines); left_out (left out: needs --peer)" in printed
    assert run(rows("quick", "other"), words) == 0
    printed = capfd.readouterr().out
    assert "three  —  not here" in printed and "1.5 GiB" not in printed, "quick is done and does not run again"
    markdown = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert (
        f"### {CARD}" in markdown and "| quick | two | 1,234,567 tokens/s | ≥ 2e+06: **missed** | a / b |" in markdown
    )
    assert "- left_out: left out: needs --peer" in markdown
    assert not list((tmp_path / "work").glob("*"))


@pytest.mark.slow
def test_a_row_that_takes_too_long_ends_with_all_its_processes_and_the_rest_goes_on(
    tmp_path: Path, words: list[str]
) -> None:
    assert run((*rows("endless", seconds=1), *rows("quick")), words) == 1
    found = read(tmp_path / "gpu.jsonl")[CARD]
    assert (found["endless"].status, found["endless"].reason) == ("timed out", "after 5 s")
    assert found["quick"].status == "done"
    wait_for(lambda: not runs(found["endless"].measurements[0].value or 0))


def test_what_has_no_time_is_named_and_left_for_the_next_call(
    tmp_path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run((*rows("quick", seconds=800), *rows("other", seconds=40)), [*words, "--minutes", "1"]) == 0
    assert "left out: quick (not started: 60 s left, may take 4000)" in capfd.readouterr().out
    assert list(read(tmp_path / "gpu.jsonl")[CARD]) == ["other"]


@pytest.mark.slow
def test_a_killed_command_keeps_what_it_has_and_leaves_no_process_behind(tmp_path: Path, words: list[str]) -> None:
    results = tmp_path / "gpu.jsonl"
    command = Command(functools.partial(run, rows("quick", "endless"), words))
    wait_for(lambda: "child" in (results.read_text(encoding="utf-8") if results.exists() else ""))
    command.kill()
    found = read(results)[CARD]
    assert len(found["quick"].measurements) == 2 and found["quick"].status == "done"
    assert found["endless"].status == "interrupted"
    wait_for(lambda: not runs(found["endless"].measurements[0].value or 0))
    assert run((*rows("endless", seconds=1), *rows("other")), words) == 1
    events = [line for line in results.read_text(encoding="utf-8").splitlines() if '"start"' in line]
    assert [line.split('"row": ')[1].split('"')[1] for line in events] == ["quick", "endless", "other", "endless"]


def test_rows_are_chosen_by_name_and_an_unknown_one_is_one_line(
    tmp_path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(rows("quick", "other"), ["other", *words]) == 0
    assert list(read(tmp_path / "gpu.jsonl")[CARD]) == ["other"]
    assert run(rows("quick", "other"), ["quik", *words]) == 2
    assert capfd.readouterr().err == "error: 'quik' is not a row; did you mean 'quick'?; allowed: 'quick', 'other'\n"


def test_a_torn_line_is_skipped_and_a_row_started_again_replaces_itself(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    for value in (1.0, 2.0):
        append(path, "start", CARD, "row", machine="a machine")
        append(path, "measurement", CARD, "row", **Measurement("what", value, least=1.5).to_json())
        with path.open("a") as file:
            file.write('{"event": "end", "ca')
    append(path, "start", "another card", "row")
    found = read(path)
    assert [entry.value for entry in found[CARD]["row"].measurements] == [2.0]
    assert found[CARD]["row"].status == "interrupted"
    assert table(found, ["row"]).splitlines()[:7] == [
        f"### {CARD}", "", "a machine.", "", "| row | what | value | goal | |", "|---|---|---:|---|---|",
        "| row | what | 2 | ≥ 1.5: met |  |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "text", "bounds"),
    [
        (Measurement("", 123456.7, "tokens/s", least=460_000), "123,457 tokens/s", "≥ 460,000: **missed**"),
        (Measurement("", 0.000123, "", most=1e-3), "0.000123", "≤ 0.001: met"),
        (Measurement("", 1.05, "×", least=0.9, most=1.1), "1.05 ×", "≥ 0.9 and ≤ 1.1: met"),
        (Measurement("", float("nan"), most=1), "nan", "≤ 1: **missed**"),
        (Measurement("", None, most=1, note="not measured"), "—", "≤ 1"),
        (Measurement("", 3.0, "s"), "3 s", ""),
    ],
)
def test_quantities_and_goals_are_readable(entry: Measurement, text: str, bounds: str) -> None:
    assert (quantity(entry), goal(entry)) == (text, bounds)


def test_a_setup_survives_the_way_to_another_process(tmp_path: Path) -> None:
    setup = Setup(tmp_path, tmp_path / "gpu.jsonl", "NVIDIA H100 80GB HBM3", peer=tmp_path / "nanoGPT")
    assert Setup.from_json(setup.to_json()) == setup


# The rows ------------------------------------------------------------------------------------------------------------


def test_every_row_has_a_name_of_its_own_and_a_function() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(callable(load(row.function)) for row in ROWS)


@pytest.mark.parametrize("name", SPEED_ROWS)
def test_experiments_of_real_size_fit_together(name: str, tmp_path: Path) -> None:
    """They are checked here, where nobody pays for a GPU."""
    experiment = speed_experiment(Setup(tmp_path, tmp_path, "NVIDIA H100"), name)
    check(experiment)
    tokens = experiment.data.batch_size * experiment.data.seq_len
    assert experiment.training.precision == "bf16" and tokens in (16_384, 32_768)


def test_data_has_the_models_vocabulary_and_room_to_validate(tmp_path: Path) -> None:
    setup = Setup(tmp_path, tmp_path, "NVIDIA H100")
    store = data_for(dataclasses.replace(speed_experiment(setup, "gpt2")), tmp_path / "data")
    tokens = store.splits["train"].read(0, 100_000)
    assert store.vocab_size == 50_257 and 50_000 < tokens.max() < 50_257


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(masks, marks=pytest.mark.slow),
        experts,
        optimizers,
        loss_chunks,
        losses,
        pytest.param(grpo_round, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_parts_are_as_exact_here_as_they_must_be_there(
    row: Callable[[Setup], Iterator[Measurement]], toy: Setup
) -> None:
    found = list(row(toy))
    assert len(found) >= 4
    assert not [entry for entry in found if entry.met is False]


def test_an_error_does_not_depend_on_scale() -> None:
    right = torch.tensor([3.0, 4.0])
    assert error_of(right * 1.01, right) == pytest.approx(0.01) == error_of(right * 1010, right * 1000)
    assert not error_of(right * float("nan"), right) <= 1


def test_a_trace_counts_the_events_of_its_steps_and_no_others(toy: Setup) -> None:
    trainer = trainer_of(cases(toy)["GPT, fp16"], toy.folder / "run")
    trainer.step()
    found = trace(trainer)
    close(trainer)
    assert trainer.position.step == 1 + STEPS
    assert found["aten::embedding"] == 2 * STEPS, "of tokens and of positions"
    assert found[READ] >= STEPS, "the number of targets"


def test_a_function_of_a_script_comes_without_running_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit\n\ndef get_batch(split):\n    return np.full(2, block_size), split\n")
    numbers, split = function_of(script, "get_batch", block_size=7)("train")
    assert numbers.tolist() == [7, 7] and split == "train"
    with pytest.raises(UserError, match=r"train\.py has no function get_lr; --peer is to be a checkout of nanoGPT"):
        function_of(script, "get_lr")


def test_bytes_that_differ_are_counted_over_all_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, value in (("one", 1.0), ("other", -1.0)):
        folder = tmp_path / name / "snapshots" / "mb000001"
        folder.mkdir(parents=True)
        save_file({"weight": torch.tensor([value, 2.0]), "count": torch.tensor(7)}, folder / "shard_00000.safetensors")
    assert differing(tmp_path / "one", tmp_path / "one") == 0
    assert differing(tmp_path / "one", tmp_path / "other") == 1, "the byte of the sign"


@pytest.mark.slow
def test_a_plan_counts_a_chunked_loss_in_chunks(tmp_path: Path) -> None:
    from cleangpt.distributed.datasheets import find_device

    chunked = speed_experiment(Setup(tmp_path, tmp_path, "NVIDIA H100"), "llama 1B, 4096")
    chunked = dataclasses.replace(
        chunked, model=dataclasses.replace(chunked.model, n_layers=2),
        training=dataclasses.replace(chunked.training, loss_chunk=4096),
    )  # fmt: skip
    whole = dataclasses.replace(chunked, training=dataclasses.replace(chunked.training, loss_chunk=None))
    logits = [make_plan(one, find_device("h100"), [1]).best(1).memory.logits for one in (chunked, whole)]
    head = 2 * (4 + 2) * 128_256 * 2048  # the gradient of a chunk and the sum, each in fp32 and in bf16
    assert logits[0] - head < 0.6 * logits[1]


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A stand-in for a checkout of nanoGPT, with what the rows use of one."""
    folder = tmp_path / "nanoGPT"
    for name, text in PEER.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


CUDA_ALONE = {"graphs"}
"""Rows of what only CUDA has; `tests/inference/test_graphs.py` tests the same with a stand-in."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "chosen",
    [
        [row for row in ROWS if row.name in ("gpt2", "resume", "graphs", "generation", "plan")],
        pytest.param(ROWS, marks=pytest.mark.torture),
    ],
    ids=["a few", "all"],
)
def test_every_row_runs_at_toy_size(
    tmp_path: Path, words: list[str], peer: Path, chosen: list[Row], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(chosen, [*words, "--peer", str(peer), "--minutes", "60"]) == 0, capfd.readouterr()
    found = read(tmp_path / "gpu.jsonl")[CARD]
    expected = {row.name: "left out" if row.name in CUDA_ALONE else "done" for row in chosen}
    assert {name: outcome.status for name, outcome in found.items()} == expected
    for name in CUDA_ALONE & found.keys():
        assert found.pop(name).reason == "needs CUDA"
    for name, outcome in found.items():
        assert outcome.measurements, name
        for entry in outcome.measurements:
            assert entry.met is not False, (name, entry)
            assert np.isfinite(entry.value) if entry.value is not None else entry.note, (name, entry)
