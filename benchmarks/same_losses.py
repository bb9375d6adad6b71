"""Whether two versions learn the same: step-by-step losses, gradient norms and final weights of short runs.

    python -m benchmarks.same_losses record before.json --checkout OLDER --text input.txt
    python -m benchmarks.same_losses record after.json --text input.txt
    python -m benchmarks.same_losses compare before.json after.json

Every macro-batch is one step here, so that metrics.jsonl has each step's metrics. A refactoring shows that nothing
differs (CONTRIBUTING.md); on one process that means bit for bit.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

PROJECT = Path(__file__).parents[1]
STEPS = 8
FIGURES = ("train_loss", "grad_norm", "val_loss", "lr", "weight_decay", "tokens")
SHORT = ("--data.val-samples", "32", "--tracking.sample-tokens", "0", "--tracking.score-samples", "0")
ADDER = ("adder", "--corpus.train-samples", "20000", "--corpus.val-samples", "100", "--corpus.test-samples", "100")
ACCUMULATED = (*ADDER, "--training.accumulation", "2", "--training.micro-batch-size", "64", "--model.dropout", "0.1")
TEXT = "TEXT"
"""Placeholder for the path of Tiny Shakespeare in the arguments below."""
MIXTURE = """\
import dataclasses
from pathlib import Path
import runpy
experiment = runpy.run_path({file!r})["experiment"]
code, verse = experiment.corpus.sources
verse = dataclasses.replace(verse, corpus=dataclasses.replace(verse.corpus, file={text!r}))
experiment = dataclasses.replace(experiment, corpus=dataclasses.replace(experiment.corpus, sources=(code, verse)))
"""
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "adder": (1, ACCUMULATED),
    "shakespeare_char_cpu": (1, ("shakespeare_char_cpu", "--corpus.file", TEXT)),
    "mixture_code_shakespeare": (1, ("mixture.py",)),
    "adder_chat": (1, ("adder_chat", "--data.batch-size", "16")),
    "stdlib_fast": (1, ("stdlib_fast",)),
    "loss_chunk": (1, ("shakespeare_char_cpu", "--corpus.file", TEXT, "--training.loss-chunk", "100")),
    "z_loss": (1, (*ADDER, "--objective.z-loss", "1e-4")),
    "lora": (
        1,
        (*ADDER, "--init-from", "runs/adder", "--fine-tuning.lora.rank", "4", "--fine-tuning.lora.dropout", "0.1"),
    ),
    "ddp": (2, (*ACCUMULATED, "--parallel.strategy", "ddp")),
    "fsdp": (2, (*ACCUMULATED, "--parallel.strategy", "fsdp")),
    "tp": (2, (*ADDER, "--parallel.strategy", "tp")),
}
"""By name: number of processes, and the arguments of ``cleangpt train``."""


def record(checkout: Path, text: Path) -> dict[str, Any]:
    """The metrics and weights of every run, trained by the code in `checkout`."""
    with tempfile.TemporaryDirectory(prefix="same-losses-") as name:
        folder = Path(name)
        source = PROJECT / "experiments" / "mixture_code_shakespeare.py"
        (folder / "mixture.py").write_text(
            MIXTURE.format(file=str(checkout / source.relative_to(PROJECT)), text=str(text))
        )
        return {run: _train(run, processes, words, checkout, text, folder) for run, (processes, words) in RUNS.items()}


def _train(name: str, processes: int, words: Sequence[str], checkout: Path, text: Path, folder: Path) -> dict[str, Any]:
    accumulation = 2 if "--training.accumulation" in words else 1
    length = ("--training.macro-batches", STEPS, "--training.batches-per-macro-batch", accumulation)
    saving = ("--saving.checkpoint-every", STEPS, "--saving.snapshot-every", STEPS)
    command = [str(text) if word == TEXT else str(word) for word in (*words, *length, *saving, *SHORT)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "cleangpt", "train", *command, "--run-dir", f"runs/{name}"]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=folder, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
    run = folder / "runs" / name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (weights,) = run.glob(f"checkpoints/*_mb{STEPS:06d}/model.safetensors")
    print(f"{name:26} {rows[-1]['train_loss']:.6f}", flush=True)
    return {"steps": [{key: row[key] for key in FIGURES} for row in rows], "weights": _digests(weights)}


def _digests(path: Path) -> dict[str, str]:
    """The SHA-256 of every tensor's bytes."""
    tensors = load_file(path)
    return {name: hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest() for name in sorted(tensors)}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each run: that it is bitwise identical, or the largest differences."""
    lines = []
    for name in before.keys() & after.keys() if before.keys() != after.keys() else before:
        old, new = before[name], after[name]
        if old == new:
            lines.append(f"{name:26} same to the last bit: {len(old['steps'])} steps, {len(old['weights'])} tensors")
            continue
        largest = {
            key: max(abs(a[key] - b[key]) for a, b in zip(old["steps"], new["steps"], strict=True)) for key in FIGURES
        }
        different = [tensor for tensor in old["weights"] if old["weights"][tensor] != new["weights"].get(tensor)]
        words = ", ".join(f"{key} by {value:.3g}" for key, value in largest.items() if value)
        lines.append(f"{name:26} differs: {words or 'no metric'}; {len(different)} of {len(old['weights'])} tensors")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns 1 where two records differ."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_losses", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train the short runs and record their losses and weights")
    recording.add_argument("file", type=Path)
    recording.add_argument("--checkout", type=Path, default=PROJECT, help="the version to train with")
    recording.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare, input.txt")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("files", type=Path, nargs=2)
    options = parser.parse_args(arguments)
    if options.command == "record":
        content = record(options.checkout.resolve(), options.text.resolve())
        options.file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return 0
    lines = compare(*(json.loads(file.read_text(encoding="utf-8")) for file in options.files))
    print("\n".join(lines))
    return int(any("differs" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
