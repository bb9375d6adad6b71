"""Seconds from the start of a process to a validation loss on Tiny Shakespeare: nanoGPT's GPU recipe and ours.

nanoGPT says 1.4697 for its recipe. A run's clock starts with its process, imports and compilation included, and stops
at the first validation at or below that loss. nanoGPT validates on 200 random batches, ours on the whole split, so its
best checkpoint is validated as ours is as well.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.journal import Outcome, read
from benchmarks.gpu.setup import PROJECT, LeftOut, Measurement, Setup
from benchmarks.step import nanogpt_module
from benchmarks.vs_nanogpt import copy_of_peer
from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.shakespeare_char import SIZE, ShakespeareChar
from cleangpt.data.batch import IGNORED
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import validation_batches
from cleangpt.data.mixing import MixedDataset, MixtureSource, split_samples
from cleangpt.distributed.device import autocast
from cleangpt.tracking.metrics import read_metrics

TARGET = 1.4697
"""nanoGPT's validation loss of its GPU recipe, in nats, as its README has it."""
FAST_GOAL = 0.2
PEER_TIME, TIME = "nanoGPT: seconds to its loss", "seconds to its loss"
RECIPE = ("--training.compile", "model")
FAST = (
    "--data.batch-size", "64", "--model.dropout", "0.1", "--optimizer.lr", "2e-3", "--optimizer.muon.lr", "3e-3",
    "--schedule.lr.shape", "wsd", "--schedule.lr.final", "0", "--schedule.lr.decay", "0.8",
    "--training.macro-batches", "6", "--training.batches-per-macro-batch", "100",
)  # fmt: skip
"""The recipe for a large GPU, found on an H200: Muon and a rate that decays to zero learn in 600 steps what nanoGPT's
recipe does. Not compiled, since compilation takes longer than all of them."""
TOY = (
    "--data.batch-size", "2", "--data.seq-len", "16", "--data.val-samples", "8", "--model.max-seq-len", "16",
    "--model.n-layers", "1", "--model.dim", "12", "--training.macro-batches", "1",
    "--training.batches-per-macro-batch", "2", "--training.compile", "off", "--training.device", "cpu",
)  # fmt: skip
TOY_PEER = (
    "--device=cpu", "--compile=False", "--batch_size=2", "--block_size=16", "--n_layer=1", "--n_embd=12",
    "--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--warmup_iters=1", "--lr_decay_iters=2",
    "--always_save_checkpoint=True",
)  # fmt: skip


def shakespeare_char(setup: Setup) -> Iterator[Measurement]:
    """Ours by nanoGPT's recipe, then nanoGPT."""
    text = text_of(setup)
    ours, measured = run_of_ours("ours, nanoGPT's recipe", (*RECIPE, *setup.size((), TOY)), text, setup)
    yield from measured
    if setup.peer is None:
        yield Measurement(PEER_TIME, note="needs --peer")
        return
    theirs, measured = run_of_peer(text, setup)
    yield from measured
    if ours is not None:
        most = None if setup.toy else 1
        yield Measurement("ours over nanoGPT: time to its loss", ours / theirs, "×", most=most)


def fast(setup: Setup) -> Iterator[Measurement]:
    """Our own recipe for the card, against the time that nanoGPT took in the row `shakespeare_char`."""
    ours, measured = run_of_ours("ours, fast", (*FAST, *setup.size((), TOY)), text_of(setup), setup)
    yield from measured
    before = read(setup.results)[setup.card].get("shakespeare_char", Outcome()).measurements
    theirs = next((entry.value for entry in before if entry.what == PEER_TIME), None)
    if theirs is None or ours is None:
        yield Measurement("ours, fast, over nanoGPT: time to its loss", note="one of the two did not get there")
        return
    most = None if setup.toy else FAST_GOAL
    yield Measurement("ours, fast, over nanoGPT: time to its loss", ours / theirs, "×", most=most)


def text_of(setup: Setup) -> Path:
    """Tiny Shakespeare; in a toy run, as many characters that it has not.

    Raises:
        LeftOut: there is none.
    """
    there = setup.peer and setup.peer / "data" / "shakespeare_char" / "input.txt"
    if setup.text is not None:
        return setup.text
    if setup.toy:
        path = setup.folder / "input.txt"
        path.write_text(("".join(map(chr, range(48, 48 + 65))) * (SIZE // 65 + 1))[:SIZE], encoding="utf-8")
        return path
    if there is None or not there.is_file():
        raise LeftOut("needs --text, Tiny Shakespeare, or a checkout of nanoGPT that has prepared it")
    return there


def run_of_ours(what: str, words: Sequence[str], text: Path, setup: Setup) -> tuple[float | None, list[Measurement]]:
    """An experiment from start to end, by the command line; returns the seconds to the target, None without."""
    run = setup.folder / "ours"
    command = [
        sys.executable, "-m", "cleangpt", "train", "shakespeare_char", "--run-dir", str(run),
        "--corpus.file", str(text), "--data.folder", str(setup.folder / "data"), "--tracking.sample-tokens", "0",
        *words,
    ]  # fmt: skip
    lines = watch(command, PROJECT)
    rows = read_metrics(run)
    started = lines[-1][0] - rows[-1]["time_trained"]
    best = min(row["val_loss"] for row in rows)
    target = TARGET if not setup.toy else best
    there = next((started + row["time_trained"] for row in rows if row["val_loss"] <= target), None)
    return there, [
        Measurement(f"{what}: whole run", lines[-1][0], "s"),
        Measurement(f"{what}: best validation loss", best, "nats", most=None if setup.toy else TARGET),
        Measurement(f"{what}: {TIME}", there, "s", note="" if there else f"{TARGET} not reached"),
    ]


def run_of_peer(text: Path, setup: Setup) -> tuple[float, list[Measurement]]:
    """nanoGPT's recipe from start to end; returns the seconds to its own best loss, at most the target."""
    assert setup.peer is not None
    store = prepare_dataset(ShakespeareChar(file=str(text)), setup.folder / "data")
    peer = copy_of_peer(setup.peer, setup.folder / "peer", store)
    out = setup.folder / "out"
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", f"--out_dir={out}"]
    lines = watch(command + list(setup.size((), TOY_PEER)), peer)
    losses = [
        (seconds, float(line.rpartition("val loss ")[2])) for seconds, line in lines if line.startswith("step ")
    ]  # fmt: skip
    best = min((loss for _, loss in losses), default=float("nan"))
    there = next((seconds for seconds, loss in losses if loss <= max(TARGET, best)), lines[-1][0])
    saved = out / "ckpt.pt"  # written at each validation that is the best so far
    swept = swept_loss(peer, saved, store, setup) if saved.exists() else None
    return there, [
        Measurement("nanoGPT: whole run", lines[-1][0], "s"),
        Measurement("nanoGPT: best validation loss", swept, "nats", note=f"by its own estimate {best:.4f}"),
        Measurement(PEER_TIME, there, "s", note=f"{max(TARGET, best):.4f} by its own estimate"),
    ]


def watch(command: Sequence[str], folder: Path) -> list[tuple[float, str]]:
    """Runs a command to its end; returns what it printed, line by line, with the seconds from its start, and its end.

    Raises:
        RuntimeError: it failed; includes the end of its output.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = [(time.monotonic() - began, line.strip()) for line in process.stdout]
    if process.wait():
        raise RuntimeError(f"{' '.join(command[:4])} failed: {' '.join(line for _, line in lines[-8:])}")
    return [*lines, (time.monotonic() - began, "")]


@torch.no_grad()
def swept_loss(peer: Path, saved: Path, store: TokenDataset, setup: Setup) -> float:
    """The loss of nanoGPT's checkpoint over the whole validation split, in adjacent windows, as ours is validated."""
    content = torch.load(saved, map_location="cpu", weights_only=True)
    module = nanogpt_module(peer)
    model = module.GPT(module.GPTConfig(**content["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in content["model"].items()})
    model.to(setup.device).eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    samples = split_samples(MixedDataset([MixtureSource(store)]), "val", content["model_args"].get("block_size", 64))
    context = autocast(setup.device, setup.size(torch.bfloat16, torch.float32))
    for batch in validation_batches(samples[""], 64, setup.size(None, 64)):
        moved = batch.to(setup.device)
        with context:
            loss: Tensor = model(moved.inputs["tokens"], moved.targets.masked_fill(moved.targets == IGNORED, -1))[1]
        total += loss.double().cpu() * batch.num_targets
        count += batch.num_targets
    return total.item() / count
