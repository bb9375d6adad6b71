"""The same experiment gives the same numbers on one process and on several, under every strategy."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.config import ParallelConfig
from cleangpt.distributed.layout import Layout, check_compilation, check_devices, layout_for
from cleangpt.distributed.parallelize import gradient_sync, parallelize, wrap_ddp
from cleangpt.errors import UserError
from cleangpt.files import find_corruption
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.tracking.metrics import read_metrics
from tests import forked
from tests.forked import run_together

EXPERIMENT = '''
import os
import time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora import CORPORA
from cleangpt.corpora.base import Corpus
from cleangpt.data.writer import DatasetWriter
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.training import build
from cleangpt.training.trainer import Trainer

build.peak_flops = lambda device: 1e9  # of a CPU it is not known, and MFU would not be told

@dataclass(frozen=True, kw_only=True)
class Uneven(Corpus):
    """Rows whose loss masks have every length from 1 to all, so that no two devices have as many targets."""

    def prepare(self, folder, console):
        draw = np.random.default_rng(0)
        writer = DatasetWriter(folder, {"kind": "uneven"}, ByteTokenizer(), row_length=10, masked=True)
        for split, rows in (("train", 96), ("val", 21)):
            tokens = np.cumsum(draw.integers(0, 3, (rows, 10)), axis=1)
            mask = (np.arange(10)[None] >= draw.integers(1, 10, (rows, 1))).astype(np.uint8)
            writer.append(split, tokens.reshape(-1), np.full(rows, 10), mask=mask.reshape(-1))
        return writer.finish(lambda facts: "")

CORPORA["uneven"] = Uneven

if path := os.environ.get("LOG_SAMPLES"):
    step = Trainer.step
    def logged(self):
        take = self.source.next
        def next_batch():
            batch = take()
            with open(f"{path}_{self.ranks.rank}_{os.getpid()}.txt", "a") as file:
                file.writelines(f"{self.position.samples} {row}\\n" for row in batch.inputs["tokens"].tolist())
            return batch
        self.source.next = next_batch
        step(self)
        self.source.next = take
        if os.environ.get("DIE_AT") == str(self.position.step) and self.ranks.rank == 1:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                while not any(Path().rglob("snapshots/mb??????/manifest.json")):  # a thread writes it
                    time.sleep(0.01)
                os.kill(os.getpid(), 9)
    Trainer.step = logged

size = {"max_seq_len": 9, "n_layers": 2, "n_heads": 4, "dim": 16}
MODELS = {
    "gpt": GPTConfig(**size),
    "llama": LlamaConfig(
        **size, n_kv_heads=2, hidden_dim=24, qk_norm=True, sliding_window=5, ngrams=(2,), ngram_rows=9
    ),
}
MUON = MuonConfig(lr=1e-2, iterations=3) if os.environ.get("OPTIMIZER") == "muon" else MuonConfig()

experiment = Experiment(
    name="uneven",
    corpus=Uneven(),
    data=DataConfig(seq_len=9, batch_size=8),
    model=MODELS[os.environ.get("MODEL", "gpt")],
    optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5, muon=MUON, lr_factors=(("*embedding*", 2.0),)),
    schedule=ScheduleConfig(
        lr=Schedule(shape="cosine", warmup=0.2), batch_size=Schedule(shape="linear", initial=0.25, final=1.0)
    ),
    training=TrainingConfig(
        macro_batches=4, batches_per_macro_batch=6, accumulation=3, micro_batch_size=2, device="cpu", threads=1
    ),
    tracking=TrackingConfig(progress=False, sample_tokens=4),
)
'''


def torchrun(processes: int, *words: str, restarts: int, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        f"--max-restarts={restarts}", "-m", "cleangpt", *words,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)


def train(run: str, processes: int, *words: str, **environment: str) -> None:
    outcome = run_together(processes, "train", "uneven.py", "--run-dir", run, *words, timeout=240, **environment)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


def final(run: str) -> dict[str, torch.Tensor]:
    """Every tensor of the newest snapshot, by its path."""
    return dict(tensors_of(load_snapshot(list_snapshots(Path(run) / "snapshots")[0]), ""))


def tensors_of(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from tensors_of(value, f"{path}/{key}".strip("/"))


def assert_same_run(one: str, two: str) -> None:
    """Losses, gradient norms, weights and moments to float tolerance; data, steps and schedules exactly."""
    for ours, theirs in zip(read_metrics(Path(one)), read_metrics(Path(two)), strict=True):
        for name in ("macro_batch", "step", "samples", "lr", "training_batch_size", "visited_share"):
            assert ours[name] == theirs[name], name
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    first, second = final(one), final(two)
    assert first.keys() == second.keys() or {k for k in first if "random" not in k} == {
        k for k in second if "random" not in k
    }
    for name in first:
        if not name.startswith(("random", "meter")):
            torch.testing.assert_close(
                first[name], second[name], atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n} {m}"
            )


@pytest.fixture
def single(workplace: Path) -> str:
    (workplace / "uneven.py").write_text(EXPERIMENT)
    train("single", 1)
    return "single"


STRATEGIES = [
    (2, ["ddp"]),
    (2, ["fsdp"]),
    pytest.param(4, ["ddp"], marks=pytest.mark.torture),
    pytest.param(4, ["fsdp"], marks=pytest.mark.torture),
    (4, ["hsdp", "--parallel.replicas", "2"]),
    pytest.param(2, ["fsdp", "--parallel.no-reshard-after-forward"], marks=pytest.mark.torture),
    (2, ["fsdp", "--training.recompute-every", "1", "--training.loss-chunk", "5"]),
    pytest.param(2, ["ddp", "--training.loss-chunk", "5"], marks=pytest.mark.torture),
    pytest.param(2, ["ddp", "--training.compile", "model"], marks=pytest.mark.torture),
    pytest.param(2, ["fsdp", "--training.compile", "model"], marks=pytest.mark.torture),
    pytest.param(2, ["fsdp", "--training.compile", "blocks"], marks=pytest.mark.torture),
    (2, ["fsdp", "--training.compile", "blocks", "--training.recompute-every", "1"]),
    (1, ["fsdp", "--parallel.tensor", "2"]),
    pytest.param(1, ["hsdp", "--parallel.replicas", "2"], marks=pytest.mark.torture),
    (2, ["tp"]),
    pytest.param(4, ["tp"], marks=pytest.mark.torture),
    pytest.param(4, ["fsdp", "--parallel.tensor", "2"], marks=pytest.mark.torture),
    (4, ["fsdp", "--parallel.tensor", "2", "--training.recompute-every", "2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), STRATEGIES, ids=lambda value: str(value))
def test_several_processes_learn_what_one_does(single: str, processes: int, strategy: list[str]) -> None:
    """With uneven loss masks, clipping, an accumulation ramp, micro-batches and a validation set of an odd size."""
    words = [] if processes < 4 else ["--training.micro-batch-size", "1"]
    train("several", processes, "--parallel.strategy", *strategy, *words)
    assert_same_run(single, "several")
    one, several = (json.loads(Path(run, "checkpoints/index.json").read_text()) for run in (single, "several"))
    assert [entry["macro_batch"] for entry in one["checkpoints"]] == [
        entry["macro_batch"] for entry in several["checkpoints"]
    ]
    for entry in several["checkpoints"]:
        assert find_corruption(Path("several/checkpoints") / entry["name"]) == ""


def test_two_processes_sharing_the_data_learn_what_one_does(single: str) -> None:
    train("several", 2)
    assert_same_run(single, "several")
    alone, shared = (read_metrics(Path(run))[0] for run in (single, "several"))
    for line, devices in ((alone, 1), (shared, 2)):
        flops = alone["mfu"] / alone["tokens_per_second"]
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / devices), "of the peak of all devices"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (2, ["tp"]),
        pytest.param(2, ["fsdp"], marks=pytest.mark.torture),
        pytest.param(
            4, ["fsdp", "--parallel.tensor", "2", "--training.micro-batch-size", "1"], marks=pytest.mark.torture
        ),
    ],
    ids=["tp", "fsdp", "both"],
)
def test_a_llama_with_shared_keys_norms_in_heads_and_windows_is_cut_as_well(
    workplace: Path, processes: int, words: list[str]
) -> None:
    (workplace / "uneven.py").write_text(EXPERIMENT)
    train("single", 1, MODEL="llama")
    train("several", processes, "--parallel.strategy", *words, MODEL="llama")
    assert_same_run("single", "several")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "processes", "strategy"),
    [
        ("gpt", 2, ["tp"]),
        pytest.param(
            "gpt",
            4,
            ["fsdp", "--parallel.tensor", "2", "--training.micro-batch-size", "1"],
            marks=pytest.mark.torture,
        ),
        ("llama", 2, ["fsdp"]),
        pytest.param("llama", 2, ["ddp"], marks=pytest.mark.torture),
    ],
)
def test_muon_makes_whole_matrices_orthogonal_however_they_are_cut(
    workplace: Path, model: str, processes: int, strategy: list[str]
) -> None:
    (workplace / "uneven.py").write_text(EXPERIMENT)
    train("single", 1, MODEL=model, OPTIMIZER="muon")
    train("several", processes, "--parallel.strategy", *strategy, MODEL=model, OPTIMIZER="muon")
    assert_same_run("single", "several")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(["ddp"], marks=pytest.mark.torture),
        ["fsdp"],
        pytest.param(["tp"], marks=pytest.mark.torture),
    ],
    ids=["ddp", "fsdp", "tp"],
)
def test_bf16_learns_nearly_the_same_under_every_strategy(single: str, strategy: list[str]) -> None:
    """Under fsdp by gathering bf16, else by autocast; weights and moments stay fp32."""
    train("mixed", 2, "--parallel.strategy", *strategy, "--training.precision", "bf16")
    for ours, theirs in zip(read_metrics(Path("mixed")), read_metrics(Path(single)), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.03)
    weights = {name: tensor for name, tensor in final("mixed").items() if name.startswith(("model", "optimizer/mom"))}
    assert weights and all(tensor.dtype == torch.float32 for tensor in weights.values())


def samples_logged() -> dict[int, set[str]]:
    """The samples of the batch that began at each position, over all processes and tries."""
    seen: dict[int, set[str]] = {}
    for path in Path().glob("seen_*.txt"):
        for line in path.read_text().splitlines():
            position, row = line.split(" ", 1)
            seen.setdefault(int(position), set()).add(row)
    return seen


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(single: str) -> None:
    """Under ddp x 2 until a process is killed, under fsdp x 4 until one is, then alone; the log of samples proves
    that what was done again was done with the same samples, and that each was seen once an epoch."""
    words = ["--run-dir", "hops", "--training.micro-batch-size", "1"]
    first = run_together(2, "train", "uneven.py", *words, "--parallel.strategy", "ddp", DIE_AT="11", LOG_SAMPLES="seen")
    assert first.returncode != 0 and 1 <= len(read_metrics(Path("hops"))) <= 3
    second = run_together(4, "resume", "hops", "--parallel.strategy", "fsdp", DIE_AT="13", LOG_SAMPLES="seen")
    assert second.returncode != 0
    third = run_together(1, "resume", "hops", "--parallel.strategy", "auto", LOG_SAMPLES="seen")
    assert third.returncode == 0, third.stderr
    assert_same_run(single, "hops")
    seen = samples_logged()
    steps = sorted(seen)
    epochs = [set().union(*(seen[step] for step in steps if epoch * 96 <= step < (epoch + 1) * 96)) for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [96, 96] and epochs[0] == epochs[1]
    assert sum(len(seen[step]) for step in steps) == 192


@pytest.mark.slow
def test_a_killed_process_ends_all_and_torchrun_starts_them_again_from_the_newest_snapshot(single: str) -> None:
    began = time.monotonic()
    outcome = torchrun(2, "train", "uneven.py", restarts=1, LOG_SAMPLES="seen", DIE_AT="9")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert time.monotonic() - began < 120
    (run,) = Path("runs/uneven").iterdir()
    assert "resuming from" in (run / "log.txt").read_text()
    assert_same_run(single, str(run))


@pytest.mark.slow
def test_an_error_on_one_process_ends_all_with_its_message(single: str) -> None:
    text = Path("uneven.py").read_text()
    failing = (
        text.replace("Trainer.step = logged", "pass")
        + """
if os.environ.get("RANK") == "1":
    def broken(self):
        raise RuntimeError("the disk of rank 1 is on fire")
    Trainer.step = broken
"""
    )
    Path("uneven.py").write_text(failing)
    began = time.monotonic()
    outcome = run_together(2, "train", "uneven.py", "--run-dir", "broken")
    assert outcome.returncode != 0 and "the disk of rank 1 is on fire" in outcome.stderr
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
def test_a_signal_to_one_process_makes_all_save_the_same_step(single: str) -> None:
    text = (
        Path("uneven.py").read_text()
        + """
if os.environ.get("RANK") == "1" and "RESUMED" not in os.environ:
    import signal
    plain_step = Trainer.step
    def signalled(self):
        plain_step(self)
        if self.position.step == 6:
            signal.raise_signal(signal.SIGTERM)
    Trainer.step = signalled
"""
    )
    Path("uneven.py").write_text(text)
    outcome = run_together(2, "train", "uneven.py", "--run-dir", "stopped")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "interrupted and saved" in Path("stopped/log.txt").read_text()
    assert len(read_metrics(Path("stopped"))) < 4
    outcome = run_together(2, "resume", "stopped", RESUMED="1")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert_same_run(single, "stopped")


@pytest.mark.parametrize(("replicas", "processes"), [(1, 4), (4, 4), (3, 4)])
def test_copies_that_do_not_fit_the_processes_are_refused(replicas: int, processes: int) -> None:
    with pytest.raises(UserError, match=f"parallel.replicas is {replicas}; allowed with strategy hsdp: a divisor"):
        layout_for(ParallelConfig(strategy="hsdp", replicas=replicas), processes)


@pytest.mark.parametrize(
    ("config", "processes", "message"),
    [
        (ParallelConfig(strategy="ddp", tensor=2), 4, "parallel.tensor is 2; allowed with strategy ddp: 1"),
        (ParallelConfig(strategy="fsdp", tensor=3), 4, "parallel.tensor is 3; allowed: a divisor of the 4 processes"),
        (ParallelConfig(strategy="hsdp", replicas=2, tensor=2), 4, "a divisor of the 2 groups of 2 processes"),
    ],
    ids=["ddp", "remainder", "one group each"],
)
def test_matrices_cut_in_a_way_that_does_not_fit_are_refused(
    config: ParallelConfig, processes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        layout_for(config, processes)


def test_compiling_over_gloo_where_matrices_are_cut_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.compile is 'blocks'; allowed with tensor parallelism on CPUs: off"):
        check_compilation("blocks", Layout(tensor=2), torch.device("cpu"))
    check_compilation("blocks", Layout(replicas=2), torch.device("cpu"))
    check_compilation("blocks", Layout(tensor=2), torch.device("cuda"))


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_several_processes_cannot_have_each_is_refused(device: str) -> None:
    message = f"training.device is '{device}'; allowed with 2 processes: cpu, or cuda, where each process takes its own"
    with pytest.raises(UserError, match=message):
        check_devices(torch.device(device), 2)
    check_devices(torch.device(device), 1)
    check_devices(torch.device("cuda"), 2)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp", "hsdp", "tp"])
def test_one_process_has_the_whole_model_whatever_the_strategy(strategy: str) -> None:
    tensor = 2 if strategy in ("fsdp", "hsdp") else 1
    assert layout_for(ParallelConfig(strategy=strategy, replicas=2, tensor=tensor), 1) == Layout()


def test_the_processes_that_share_a_matrix_are_neighbours_and_see_the_same_part_of_a_batch() -> None:
    layout = layout_for(ParallelConfig(strategy="hsdp", replicas=2, tensor=2), 8)
    assert layout == Layout(replicas=2, shards=2, tensor=2)
    assert [layout.dp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3] and layout.dp_size == 4


def test_a_batch_that_the_processes_do_not_divide_is_refused_before_anything_is_made(workplace: Path) -> None:
    (workplace / "uneven.py").write_text(EXPERIMENT)
    outcome = forked.run("train", "uneven.py", WORLD_SIZE="3", RANK="0", LOCAL_RANK="0")
    assert outcome.returncode == 2
    assert outcome.stderr == "rank 0: error: data.batch_size is 8; allowed: a multiple of the 3 devices\n"
    assert not Path("runs").exists() and not Path("data").exists()


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """The first of two processes, of which the other is pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


MODEL = GPTConfig(vocab_size=32, max_seq_len=16, n_layers=2, n_heads=2, dim=16)
TOKENS = torch.zeros(2, 16, dtype=torch.long)
CPU = torch.device("cpu")


def test_ddp_exchanges_gradients_after_the_last_micro_batch_of_a_step_only(one_of_two: None) -> None:
    exchanges: list[int] = []
    layout = Layout(replicas=2)
    called = wrap_ddp(parallelize(lambda: GPT(MODEL), layout, CPU), layout, CPU)
    assert isinstance(called, DistributedDataParallel)

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanges[-1] += 1
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    called.register_comm_hook(None, count)
    for last in (False, False, True, False, True):
        exchanges.append(0)
        with gradient_sync(called, last):
            called(TOKENS).sum().backward()
    assert [number > 0 for number in exchanges] == [False, False, True, False, True]


def test_fsdp_reduces_gradients_after_the_last_micro_batch_of_a_step_only(one_of_two: None) -> None:
    model = parallelize(lambda: GPT(MODEL), Layout(shards=2), CPU)
    for last in (False, False, True, False, True):
        with gradient_sync(model, last):
            model(TOKENS).sum().backward()
        assert {parameter.grad is not None for parameter in model.parameters()} == {last}
        model.zero_grad()
