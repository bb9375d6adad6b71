"""The same machine, text and clock: CleanGPT beside nanoGPT and a Hugging Face model.

Runs are whole processes, start and imports included, of nanoGPT's README recipe for a CPU (4 × 128, 2,000 steps) and of
two experiments here, `shakespeare_char_fast` and `shakespeare_char_minute`, on three seeds; losses are over the whole
validation split, which was not used for tuning. The experiments were tuned on a twentieth of the text, held out from
the end of the training part, in separate runs, whose loss is reported too: see docs/speed.md. Steps are of the same
model, batch and AdamW, ours with loading and bookkeeping; FLOPs are counted as in PaLM, and the limit is the rate of a
product of two large fp32 matrices in the same round. Memory is the peak of a fresh process over two steps.
"""

import contextlib
import dataclasses
import io
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loader import batch_loader
from benchmarks.made import close, flops_of_step, make_store, make_trainer, shipped, train_macro_batch
from benchmarks.resume import PROJECT, call, checked
from benchmarks.runner import Row, Setup, interleave
from benchmarks.step import Loss, adamw, nanogpt_loop, nanogpt_module, train_loop
from cleangpt.config import DataConfig
from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.data.batch import IGNORED
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import validation_batches
from cleangpt.data.mixing import MixedDataset, MixtureSource, split_samples
from cleangpt.distributed.device import can_compile
from cleangpt.experiment import Experiment
from cleangpt.files import read_json
from cleangpt.models.gpt import GPTConfig
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.launch import resolve
from cleangpt.training.trainer import Trainer

SEEDS = (1337, 1, 2)
RECIPE = (
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
)  # fmt: skip
"""The recipe in nanoGPT's README for a CPU."""
EXPERIMENTS = ("shakespeare_char_fast", "shakespeare_char_minute")
TIME_GOAL, TOKENS_GOAL, LIMIT_GOAL, START_GOAL, MEMORY_GOAL = 0.1, 1 / 1.3, 1 / 0.8, 0.5, 0.6
"""The largest acceptable ratios."""
LOSS_GOAL = 1.6
"""The loss to reach in nanoGPT's time, in nats."""


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark; those of whole runs need the peer."""
    rows = whole_runs(setup) if setup.peer is not None else []
    for layers, dim, heads, batch_size, seq_len in [(4, 128, 4, 12, 64), (6, 384, 6, 64, 256)]:
        if setup.quick and dim > 128:
            continue
        data = DataConfig(seq_len=seq_len, batch_size=batch_size)
        size = {"max_seq_len": seq_len, "n_layers": layers, "dim": dim, "n_heads": heads, "dropout": 0.0}
        rows += steps(shipped("shakespeare_char_cpu", data, model=size), setup)
    return rows + memory(setup) + growth(setup)


# Whole runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The result of a complete run."""

    seconds: float
    loss: float
    """Over the whole validation split, in nats per character."""


def whole_runs(setup: Setup) -> list[Row]:
    """The time to nanoGPT's loss, the loss in nanoGPT's time, and the time to the first step."""
    assert setup.peer is not None
    folder = setup.folder.resolve()
    data, text = ["--data.folder", str(folder / "data")], None if setup.text is None else str(setup.text.resolve())
    words = data if text is None else [*data, "--corpus.file", text]
    plain = prepare_dataset(ShakespeareChar(file=text), folder / "data")
    for name in EXPERIMENTS:
        call("benchmarks.first_step", "train", name, "--run-dir", str(folder / f"first_{name}"), *words)
    peer = copy_of_peer(setup.peer, folder / "peer", plain)
    runs: dict[str, list[Outcome]] = {"nanoGPT": [], **{name: [] for name in EXPERIMENTS}}
    for seed in SEEDS[: 1 if setup.quick else None]:
        runs["nanoGPT"].append(run_of_peer(peer, seed, plain, setup.quick))
        for name in EXPERIMENTS:
            runs[name].append(run_of_ours(name, folder / f"{name}{seed}", seed, words, setup.quick))
    chosen_by = [held_out(name, folder / f"{name}_part", words, setup.quick) for name in EXPERIMENTS]
    return [*compare(runs), *chosen_by, start(peer, folder, words, setup)]


def compare(runs: Mapping[str, Sequence[Outcome]]) -> list[Row]:
    """A row for the time and one for the loss of each experiment, naming the losses of all seeds."""
    theirs, rows = runs["nanoGPT"], []
    for name in EXPERIMENTS:
        ours, quick = runs[name], name == EXPERIMENTS[0]
        losses = (", ".join(f"{one.loss:.3f}" for one in side) for side in (ours, theirs))
        what = "{}: whole run, to loss {} (nanoGPT to {})".format(name, *losses)
        times = [one.seconds for one in ours], "nanoGPT's CPU recipe", [one.seconds for one in theirs]
        rows.append(Row(what, "s", *times, TIME_GOAL if quick else 1.0))
        if not quick:
            wanted = "what nanoGPT's time should be worth"
            rows.append(Row(f"{name}: loss", "nats", [one.loss for one in ours], wanted, [LOSS_GOAL] * len(ours), 1.0))
    return rows


def copy_of_peer(checkout: Path, folder: Path, dataset: TokenDataset) -> Path:
    """A checkout of nanoGPT with Shakespeare prepared by its own script, in a folder where nothing else is touched."""
    nanogpt_module(checkout)
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl"))
    data = folder / "data" / "shakespeare_char"
    tokens = np.concatenate([dataset.splits[split].read(0, dataset.splits[split].tokens) for split in ("train", "val")])
    (data / "input.txt").write_text(dataset.tokenizer.decode(tokens.tolist()), encoding="utf-8", newline="")
    checked([sys.executable, "prepare.py"], data)
    return folder


def run_of_peer(peer: Path, seed: int, dataset: TokenDataset, quick: bool) -> Outcome:
    """nanoGPT's recipe from start to end; its last checkpoint is then evaluated over the whole validation split."""
    script, out = peer / "train.py", peer / f"out{seed}"
    seeded = script.read_text(encoding="utf-8").replace("manual_seed(1337", f"manual_seed({seed}")
    script.with_name(f"train{seed}.py").write_text(seeded, encoding="utf-8")
    words = [*RECIPE, f"--out_dir={out}", *(["--max_iters=4", "--eval_interval=2"] if quick else [])]
    seconds = checked([sys.executable, f"train{seed}.py", "config/train_shakespeare_char.py", *words], peer)
    saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
    module = nanogpt_module(peer)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return cast(Tensor, model(inputs, targets.masked_fill(targets == IGNORED, -1))[1])  # -1 is what it ignores

    return Outcome(seconds, swept_loss(loss, dataset))


@torch.no_grad()
def swept_loss(loss: Loss, dataset: TokenDataset, seq_len: int = 64) -> float:
    """The mean over the validation split, in adjacent windows, of a `loss` that is the mean over a batch."""
    total, count = 0.0, 0
    for batch in validation_batches(split_samples(MixedDataset([MixtureSource(dataset)]), "val", seq_len)[""], 64):
        total += float(loss(batch.inputs["tokens"], batch.targets)) * batch.num_targets
        count += batch.num_targets
    return total / count


def run_of_ours(name: str, run: Path, seed: int, words: Sequence[str], quick: bool) -> Outcome:
    """An experiment from start to end, by the command line."""
    less = ("--training.batches-per-macro-batch", "2", "--data.val-samples", "8") if quick else ()
    seconds = call("cleangpt", "train", name, "--run-dir", str(run), "--training.seed", str(seed), *words, *less)
    return Outcome(seconds, read_metrics(run)[-1]["val_loss"])


def held_out(name: str, run: Path, words: Sequence[str], quick: bool) -> Row:
    """The loss by which an experiment was tuned: on a twentieth of the training text, in a run without it."""
    val_loss = run_of_ours(name, run, SEEDS[0], [*words, "--corpus.held-out", "0.05"], quick).loss
    call("cleangpt", "evaluate", str(run), "--split", "test")
    loss = read_json(run / "evaluation.json")["loss"]
    what = f"{name} with a twentieth of the text held out: loss on that"
    return Row(what, "nats", [loss], "the same run's on the validation split", [val_loss])


def start(peer: Path, folder: Path, words: Sequence[str], setup: Setup) -> Row:
    """From the start of the process to the end of the first step, without validation before it."""
    numbers = itertools.count(1)
    recipe = [*RECIPE, "--max_iters=0", "--eval_iters=1", f"--out_dir={peer / 'out'}"]
    theirs = [sys.executable, "train.py", "config/train_shakespeare_char.py", *recipe]
    taken = interleave(
        {
            "ours": lambda: call(
                "benchmarks.first_step", "train", "shakespeare_char_cpu",
                "--run-dir", str(folder / f"start{next(numbers)}"), *words,
            ),
            "nanoGPT": lambda: checked(theirs, peer),
        },
        setup.repetitions,
        warm_up=True,
    )  # fmt: skip
    return Row("4 × 128: from the start to the first step", "s", taken["ours"], "nanoGPT", taken["nanoGPT"], START_GOAL)


# Steps ---------------------------------------------------------------------------------------------------------------


def steps(experiment: Experiment, setup: Setup) -> list[Row]:
    """A step of one model against the peers' step, and against the time of its matrix products alone."""
    count = 2 if setup.quick or (isinstance(experiment.model, GPTConfig) and experiment.model.dim > 128) else 20
    dataset = make_store(setup.folder / f"dataset{experiment.data.seq_len}", 1_000_000)
    changed = dataclasses.replace(
        experiment, training=dataclasses.replace(experiment.training, batches_per_macro_batch=count, macro_batches=1000)
    )
    trainer = make_trainer(changed, dataset, setup.folder / f"run{experiment.data.seq_len}")
    experiment = resolve(changed, dataset.vocab_size)
    data, model = experiment.data, experiment.model
    assert isinstance(model, GPTConfig)
    loader = batch_loader(dataset, data.batch_size, data.seq_len)
    batches = [(batch.inputs["tokens"], batch.targets) for batch in (loader.next() for _ in range(20))]
    loader.close()
    loops = peers(experiment, batches, setup)
    flops = flops_of_step(trainer)
    measures: dict[str, Callable[[], float]] = {"ours": lambda: train_macro_batch(trainer)[0]}
    measures |= {name: partial(loop, count) for name, loop in loops.items()}
    measures["its FLOPs at the rate of a large product"] = lambda: flops / product_rate()
    taken = interleave(measures, setup.repetitions if model.dim == 128 else min(3, setup.repetitions))
    close(trainer)
    ours = taken.pop("ours")
    what = f"{model.n_layers} × {model.dim}, {data.batch_size} × {data.seq_len}: a step"
    goals = {name: TOKENS_GOAL for name in taken if name.startswith("nanoGPT")} | {list(taken)[-1]: LIMIT_GOAL}
    return [Row(what, "s", ours, name, theirs, goals.get(name)) for name, theirs in taken.items()]


def peers(
    experiment: Experiment, batches: Sequence[tuple[Tensor, Tensor]], setup: Setup
) -> dict[str, Callable[[int], float]]:
    """Loops over the same batches: a Hugging Face model, and nanoGPT's as it is and compiled."""
    loops = {"Hugging Face": hugging_face_loop(experiment, batches)}
    if setup.peer is not None:
        loops["nanoGPT"] = nanogpt_loop(setup.peer, experiment, batches)
        if can_compile(torch.device("cpu")) and not setup.quick:
            loops["nanoGPT, compiled"] = nanogpt_loop(setup.peer, experiment, batches, compiled=True)
    return loops


def hugging_face_loop(experiment: Experiment, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[[int], float]:
    """A loop over Hugging Face's GPT-2 of the same size, with AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config, settings = experiment.model, experiment.optimizer
    assert isinstance(config, GPTConfig)
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size, "n_positions": config.max_seq_len, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_embd": config.dim, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": None, "eos_token_id": None, "use_cache": False,
    }  # fmt: skip
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes)).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())

    return train_loop(loss, model, adamw(model, settings), settings.clip_norm, batches)


def product_rate(size: int = 2048) -> float:
    """FLOP/s of the product of two square fp32 matrices: 2 x size³ FLOPs, the best of three."""
    one, other = torch.randn(2, size, size)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


# Memory and growth ---------------------------------------------------------------------------------------------------


def memory(setup: Setup) -> list[Row]:
    """The peak memory of two steps of the 124M-parameter GPT-2: 1,024 tokens, one sample per batch."""
    theirs = "ours, as nanoGPT's" if setup.peer is None else "nanoGPT"
    words = [] if setup.peer is None else [str(setup.peer.resolve())]
    sizes = ["quick"] if setup.quick else ["gpt2"]
    ways = {"plain": "all logits at once", "chunked": "the loss in chunks", "recomputed": "and blocks recomputed"}
    peak = {way: peak_memory(way, setup.folder.resolve(), *sizes) for way in ways}
    peers = peak_memory("nanogpt", setup.folder.resolve(), *sizes, *words) if words else peak["plain"]
    goals = {"chunked": MEMORY_GOAL}
    return [
        Row(f"GPT-2, 1 × 1024: memory, {about}", "B", [peak[way]], theirs, [peers], goals.get(way))
        for way, about in ways.items()
    ]


def peak_memory(way: str, folder: Path, *words: str) -> float:
    """The peak memory of a fresh process, in bytes."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", way, str(folder), *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT).stdout.split()[-1])


def growth(setup: Setup) -> list[Row]:
    """How a step's time grows with width, depth, context and batch, compared with its FLOPs."""
    base = {"n_layers": 4, "dim": 128, "seq_len": 64, "batch_size": 12}
    changes: list[dict[str, int]] = [{"dim": 512}, {"n_layers": 16}, {"seq_len": 512}, {"batch_size": 96}]
    dataset = make_store(setup.folder / "store_growth", 1_000_000)
    trainers = {}
    for number, change in enumerate([{}, *(changes[:1] if setup.quick else changes)]):
        size = base | change
        model = {"max_seq_len": size["seq_len"], "n_layers": size["n_layers"], "dim": size["dim"]}
        data = DataConfig(seq_len=size["seq_len"], batch_size=size["batch_size"])
        training = {"batches_per_macro_batch": 1 if setup.quick else 6, "macro_batches": 1000}
        experiment = shipped("shakespeare_char_cpu", data, model=model, training=training)
        name = ", ".join(f"{field} {base[field]} → {value}" for field, value in change.items())
        trainers[name] = make_trainer(experiment, dataset, setup.folder / f"growth{number}")

    def measure(trainer: Trainer) -> float:
        return train_macro_batch(trainer)[0]

    taken = interleave({name: partial(measure, trainer) for name, trainer in trainers.items()}, setup.repetitions)
    flops = {name: flops_of_step(trainer) for name, trainer in trainers.items()}
    for trainer in trainers.values():
        close(trainer)
    return [
        Row(f"4 × 128, 12 × 64, with {name}: a step", "s", times,
            f"{flops[name] / flops['']:.1f} × as many FLOPs as the plain one, in its time for each",
            [seconds * flops[name] / flops[""] for seconds in taken[""]])
        for name, times in taken.items() if name
    ]  # fmt: skip


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["vs_nanogpt", *sys.argv[1:]]))
