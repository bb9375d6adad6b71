"""Saving a snapshot of weights and AdamW's moments: how long training pauses, and how long the whole save takes.

The pause is the time until `Snapshots.save` returns: the copy to the host's memory. The whole save is timed with
`saving.async_snapshots` off: it also computes checksums, writes to a temporary name, renames, flushes folders and
removes the oldest snapshot. The limit of the pause is a copy of the same tensors into memory already allocated, that
of the whole save a plain write of them and one flush to the disk.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner import Row, Setup, interleave
from cleangpt.checkpoints.snapshots import Snapshots, snapshot_name
from cleangpt.config import OptimizerConfig, SavingConfig
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.training.optimizer import Optimizer


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    state = trained_state(layers=2 if setup.quick else 10, dim=64 if setup.quick else 512)
    tensors = list(tensors_of(state))
    copies = [torch.empty_like(tensor) for tensor in tensors]
    pausing = Snapshots(setup.folder / "pausing", SavingConfig())
    waiting = Snapshots(setup.folder / "waiting", SavingConfig(async_snapshots=False))
    names = map(snapshot_name, itertools.count(1))
    measures: dict[str, Callable[[], float]] = {
        "pause": lambda: pause(pausing, next(names), state),
        "whole": partial(seconds, lambda: waiting.save(next(names), state)),
        "copy": partial(seconds, lambda: copy(tensors, copies)),
        "write and flush": partial(seconds, lambda: plain_write(setup.folder / "plain.bin", tensors)),
        "torch.save and flush": partial(seconds, lambda: torch_save(setup.folder / "saved.pt", state)),
    }
    taken = interleave(measures, setup.repetitions)
    pausing.close()
    waiting.close()
    size = f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6:,.1f} MB"
    return [
        Row(f"pause for {size}", "s", taken["pause"], "copy in memory", taken["copy"]),
        Row(f"pause for {size}", "s", taken["pause"], "the whole save", taken["whole"]),
        Row(f"pause for {size}", "s", taken["pause"], "write and flush", taken["write and flush"]),
        Row(f"whole save of {size}", "s", taken["whole"], "write and flush", taken["write and flush"]),
        Row(f"whole save of {size}", "s", taken["whole"], "torch.save and flush", taken["torch.save and flush"]),
    ]


def pause(snapshots: Snapshots, name: str, state: dict[str, Any]) -> float:
    """How long a save pauses training; then waits until it is complete, so as not to disturb other measurements."""
    taken = seconds(lambda: snapshots.save(name, state))
    snapshots.wait()
    return taken


def copy(tensors: list[Tensor], copies: list[Tensor]) -> None:
    """Fills `copies` with the values of `tensors`."""
    for tensor, place in zip(tensors, copies, strict=True):
        place.copy_(tensor)


def trained_state(layers: int, dim: int) -> dict[str, Any]:
    """Model and optimizer after one update by random gradients, as the trainer's snapshot names them."""
    model = build_model(GPTConfig(vocab_size=256, max_seq_len=256, n_layers=layers, n_heads=8, dim=dim))
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-3, 0.1)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in a tree of dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of(value)


def plain_write(path: Path, tensors: list[Tensor]) -> None:
    """Replaces `path` by the bytes of the tensors and waits until they are on the disk."""
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(tensor.detach().numpy().data)
        file.flush()
        os.fsync(file.fileno())


def torch_save(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by PyTorch's own format and waits until it is on the disk."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def seconds(action: Callable[[], None]) -> float:
    """How long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
