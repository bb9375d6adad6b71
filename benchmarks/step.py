"""Overhead of a step: the trainer against a bare loop over the same model, batches and AdamW.

The bare loop has its batches in memory and does forward, loss, backward, clipping and the fused update, nothing else:
no loading, schedule, metrics, or check for non-finite gradients. With `--peer` the same loop also drives
nanoGPT's own model and optimizer.
"""

import contextlib
import importlib.util
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loader import batch_loader
from benchmarks.made import close, make_store, make_trainer, shipped, train_macro_batch
from benchmarks.runner import Row, Setup, interleave
from cleangpt.config import OptimizerConfig
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.tracking.metrics import MetricsFiles
from cleangpt.training.launch import resolve

OVERHEAD_GOAL = 1.03
LOGGING_GOAL = 0.01
BARE = "bare PyTorch loop"
Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean cross-entropy of inputs and targets, both `(batch, seq)`."""


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    steps = 3 if setup.quick else 40
    dataset = make_store(setup.folder / "dataset", 1_000_000)
    experiment = shipped("shakespeare_char_cpu", training={"batches_per_macro_batch": steps, "macro_batches": 1000})
    trainer = make_trainer(experiment, dataset, setup.folder / "run")
    experiment = resolve(experiment, dataset.vocab_size)
    loader = batch_loader(dataset, experiment.data.batch_size, experiment.data.seq_len)
    batches = [(batch.inputs["tokens"], batch.targets) for batch in (loader.next() for _ in range(100))]
    loader.close()
    loops = {BARE: bare_loop(experiment, build_model(experiment.model), batches)}
    if setup.peer is not None:
        loops["nanoGPT's model and optimizer"] = nanogpt_loop(setup.peer, experiment, batches)
    measures: dict[str, Callable[[], float]] = {"ours": lambda: train_macro_batch(trainer)[0]}
    measures |= {name: partial(loop, steps) for name, loop in loops.items()}
    taken = interleave(measures, setup.repetitions * 3)
    close(trainer)
    ours = taken.pop("ours")
    what = f"{experiment.data.batch_size} × {experiment.data.seq_len}: a step"
    rows = [
        Row(what, "s", ours, name, theirs, OVERHEAD_GOAL if name == BARE else None) for name, theirs in taken.items()
    ]
    logging = [point_time(setup.folder / "points") for _ in ours]
    return [*rows, Row("metrics of a step to steps.jsonl", "s", logging, what, ours, LOGGING_GOAL)]


def point_time(run: Path, points: int = 960, batch: int = 24) -> float:
    """Seconds that the metrics files take for the metrics of one step, logged a `batch` at a time."""
    run.mkdir(exist_ok=True)
    files = MetricsFiles(run)
    files.open(None, None)
    names = [
        "samples",
        "tokens",
        "loss",
        "lr",
        "weight_decay",
        "grad_norm",
        "tokens_per_second",
        "batch_size",
        "skipped",
    ]
    rows = [{"step": step} | dict.fromkeys(names, step / 7) for step in range(points)]
    started = time.perf_counter()
    for first in range(0, points, batch):
        files.log_steps(rows[first : first + batch])
    files.state_dict()  # a snapshot waits until they are on disk
    return (time.perf_counter() - started) / points


def bare_loop(
    experiment: Experiment, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[int], float]:
    """A loop that trains `model` as the trainer does with constant schedules and no masked target."""
    settings = experiment.optimizer

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    return train_loop(loss, model, adamw(model, settings), settings.clip_norm, batches)


def adamw(model: nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's, fused, with decay on matrices only."""
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in model.parameters() if parameter.dim() >= 2]},
        {"params": [parameter for parameter in model.parameters() if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, settings.lr, settings.betas, settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def nanogpt_loop(
    checkout: Path, experiment: Experiment, batches: Sequence[tuple[Tensor, Tensor]], compiled: bool = False
) -> Callable[[int], float]:
    """The same loop over the model and the optimizer of a nanoGPT checkout."""
    model, optimizer = nanogpt_model(checkout, experiment, torch.device("cpu"))
    called = torch.compile(model) if compiled else model
    clip_norm = experiment.optimizer.clip_norm
    return train_loop(lambda inputs, targets: called(inputs, targets)[1], model, optimizer, clip_norm, batches)


def nanogpt_model(checkout: Path, experiment: Experiment, device: torch.device) -> tuple[Any, Any]:
    """The model and the optimizer of a nanoGPT checkout, as an experiment on GPT-2 has them."""
    module, config, settings = nanogpt_module(checkout), experiment.model, experiment.optimizer
    assert isinstance(config, GPTConfig)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(
            module.GPTConfig(
                block_size=config.max_seq_len, vocab_size=config.vocab_size, n_layer=config.n_layers,
                n_head=config.n_heads, n_embd=config.dim, dropout=config.dropout, bias=config.bias,
            )
        ).to(device)  # fmt: skip
        optimizer = model.configure_optimizers(settings.weight_decay, settings.lr, settings.betas, device.type)
    return model, optimizer


def nanogpt_module(checkout: Path) -> Any:
    """The module model.py of a nanoGPT checkout.

    Raises:
        UserError: the checkout has no model.py.
    """
    path = checkout / "model.py"
    if not path.is_file():
        raise UserError(f"--peer is {str(checkout)!r}; allowed: a checkout of nanoGPT, with a model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train_loop(
    loss: Loss,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Callable[[int], float]:
    """A loop that cycles over batches: forward, loss, backward, clipping and update, nothing else."""
    endless = itertools.cycle(batches)
    parameters = list(model.parameters())

    def loop(steps: int) -> float:
        """Takes `steps` steps; returns the seconds per step."""
        start = time.perf_counter()
        for inputs, targets in itertools.islice(endless, steps):
            loss(inputs, targets).backward()  # type: ignore[no-untyped-call]
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - start) / steps

    return loop
