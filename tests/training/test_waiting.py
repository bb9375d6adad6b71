"""No step waits for the device: whole steps of the trainer on tensors without values, which nobody can wait for.

PyTorch's meta device stands for the GPU. Reading a value from it raises. What else would make the host wait is found
among the operations: copies that are not asynchronous, and operations whose CUDA kernels read something back.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cleangpt.config import MuonConfig
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.meta import SkipInit
from cleangpt.objectives import NextToken
from cleangpt.training import placing
from cleangpt.training.trainer import Trainer

DEVICE = torch.device("meta")
READ_BACK = {"bincount", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal"}
"""Operations whose CUDA kernels tell the host the size or the value of their result."""


class Waits(TorchDispatchMode):
    """Collects the operations for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if "meta" in devices and name in READ_BACK:
            self.found.append(name)
        result = func(*args, **kwargs)
        after = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        asynchronous = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        if name in ("_to_copy", "copy_") and len(devices | after) > 1 and not asynchronous:
            self.found.append(name)
        return result


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that trainers find and fused optimizers accept."""
    monkeypatch.setattr(placing, "choose_device", lambda name, rank=0: DEVICE)
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])


LLAMA = LlamaConfig(n_layers=2, n_heads=2, dim=16, hidden_dim=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"training__micro_batch_size": 2, "training__accumulation": 2, "training__loss_chunk": 10},
        {"training__recompute_every": 1, "optimizer__muon": MuonConfig(lr=0.01)},
        {"training__spike_threshold": 1.0, "objective": NextToken(z_loss=1e-4, label_smoothing=0.1)},
        {"model": replace(LLAMA, ngrams=(2, 3), separator=1, sliding_window=3, global_every=2, value_residual=True)},
    ],
    ids=["micro-batches", "muon", "spikes", "llama"],
)
def test_no_step_waits(
    changes: dict[str, Any], tiny: Callable[..., Experiment], trainer: Callable[[Experiment], Trainer], no_values: None
) -> None:
    with SkipInit():
        training = trainer(tiny(**changes))
    training.step()
    with Waits() as waits:
        training.step()
    training.source.close()
    assert training.position.step == 2 and not waits.found


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda x: torch.where(x > 0, 1.0, x), []),
        (lambda x: torch.equal(x, x), ["equal"]),
        (lambda x: torch.zeros(3).to(DEVICE), ["_to_copy"]),
        (lambda x: torch.zeros(3).to(DEVICE, non_blocking=True), []),
        (lambda x: x.copy_(torch.zeros(3)), ["copy_"]),
        (lambda x: x * 2 + x.sum(), []),
    ],
)
def test_what_waits_is_found(work: Callable[[torch.Tensor], Any], found: list[str]) -> None:
    x = torch.zeros(3, device=DEVICE)
    with Waits() as waits, contextlib.suppress(NotImplementedError, RuntimeError):
        work(x)
    assert waits.found == found


def test_a_number_that_the_host_reads_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device=DEVICE).item()
