"""A run killed by SIGKILL in the middle of a macro-batch and resumed, against one that was not, bit for bit.

With PyTorch's deterministic algorithms this must hold; without, kernels that add in no fixed order may differ, and two
undisturbed runs as well.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu.setup import PROJECT, Measurement, Setup
from cleangpt.checkpoints.snapshots import list_snapshots

EXPERIMENT = """\
import torch

from cleangpt.config import DataConfig, OptimizerConfig, SavingConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.adder import Adder
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

torch.use_deterministic_algorithms({deterministic})
corpus = Adder(digits=3, train_samples=20_000, val_samples=100, test_samples=10)
experiment = Experiment(
    name="resume",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size={batch_size}, folder={folder!r}),
    model=GPTConfig(max_seq_len=corpus.row_length - 1, n_layers={layers}, n_heads=2, dim={dim}, dropout=0.1),
    optimizer=OptimizerConfig(lr=1e-3),
    training=TrainingConfig(macro_batches=4, batches_per_macro_batch={batches}, device={device!r}),
    saving=SavingConfig(keep_snapshots=1),
    tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
)
"""


def resume(setup: Setup) -> Iterator[Measurement]:
    """The runs, with deterministic algorithms and without."""
    for deterministic in setup.size((True, False), (True,)):
        kind = "deterministic algorithms" if deterministic else "fastest algorithms"
        folder = setup.folder / kind.replace(" ", "_")
        folder.mkdir()
        batches = setup.size(50, 4)
        file = folder / "experiment.py"
        file.write_text(
            EXPERIMENT.format(
                deterministic=deterministic, folder=str(setup.folder / "data"), device=str(setup.device),
                batches=batches, batch_size=setup.size(64, 8), layers=setup.size(4, 1), dim=setup.size(128, 16),
            ),
            encoding="utf-8",
        )  # fmt: skip
        whole, again, killed = (folder / name for name in ("whole", "again", "killed"))
        train = ("train", str(file), "--run-dir")
        run("cleangpt", *train, str(whole))
        code = run("benchmarks.gpu.killed", str(5 * batches // 2), *train, str(killed), killed=True)
        yield Measurement(f"{kind}: exit code of the killed run", code, least=-9, most=-9)
        run("cleangpt", "resume", str(killed))
        most = 0 if deterministic else None
        yield Measurement(f"{kind}: bytes that differ after the resume", differing(whole, killed), most=most)
        if not deterministic:
            run("cleangpt", *train, str(again))
            yield Measurement(f"{kind}: bytes that differ between undisturbed runs", differing(whole, again))


def run(module: str, *words: str, killed: bool = False) -> int:
    """Runs `python -m module words`; returns its exit code.

    Raises:
        RuntimeError: it failed, other than by SIGKILL where that is expected.
    """
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which deterministic algorithms need
    process = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    if process.returncode and not killed:
        raise RuntimeError(f"{module} {words[0]} failed: {process.stderr[-600:]}")
    return process.returncode


def differing(one: Path, other: Path) -> float:
    """Bytes that differ between the newest snapshots of two runs: weights, moments, random generators."""
    states = [newest(run) for run in (one, other)]
    if states[0].keys() != states[1].keys():
        raise RuntimeError(f"the snapshots have different tensors: {sorted(states[0].keys() ^ states[1].keys())}")
    pairs = ((states[0][name], states[1][name]) for name in states[0])
    return float(sum((a.view(torch.uint8) != b.view(torch.uint8)).sum().item() for a, b in pairs))


def newest(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest snapshot, each as one row of numbers."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(list_snapshots(run / "snapshots")[0].glob("*.safetensors")):
        found |= {name: tensor.flatten() for name, tensor in load_file(shard).items()}
    return found
