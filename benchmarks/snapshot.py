"""Saving a snapshot of weights and AdamW's moments, against the disk's own speed and against torch.save.

The limit is a plain write of the same tensors and one flush to the disk. Ours also takes checksums, writes aside,
renames, flushes folders and removes the oldest snapshot.
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
from cleangpt.config import OptimizerConfig
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.snapshots import save_snapshot, snapshot_name


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    state = trained_state(layers=2 if setup.quick else 10, dim=64 if setup.quick else 512)
    tensors = list(tensors_of(state))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    numbers = itertools.count(1)
    savers: dict[str, Callable[[], None]] = {
        "ours": lambda: save_snapshot(setup.folder / "snapshots", snapshot_name(next(numbers)), state, keep=2),
        "write and flush": lambda: plain_write(setup.folder / "plain.bin", tensors),
        "torch.save and flush": lambda: torch_save(setup.folder / "saved.pt", state),
    }
    taken = interleave({name: partial(seconds, save) for name, save in savers.items()}, setup.repetitions)
    ours = taken.pop("ours")
    what = f"save {size / 1e6:,.1f} MB"
    return [Row(what, "s", ours, name, theirs) for name, theirs in taken.items()]


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
