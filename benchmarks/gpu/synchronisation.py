"""Whether the host waits for the device within a step, from a profiler's trace of whole steps of the trainer.

What waits, and is stated in docs/speed.md, happens between steps: the end of a macro-batch, the progress bar, rows of
steps.jsonl, snapshots.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.models import data_for, experiment
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.made import close, make_trainer
from cleangpt.config import MuonConfig, OptimizerConfig
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.training.trainer import Trainer

STEPS, WARM_UP = 5, 3
REGION = "steps of the trainer"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
"""Calls of the CUDA runtime that return when the device has finished."""
COPIES = ("Pageable", "Memcpy DtoH")
"""Parts of the names of copies that a step has no use for: from memory that is not pinned, and back to the host."""
READ = "aten::_local_scalar_dense"
"""The operation behind `.item()`; a step reads one number of each batch, on the host, before it goes to the device."""


def synchronisation(setup: Setup) -> Iterator[Measurement]:
    """The waits in a step of every kind of training."""
    for number, (name, planned) in enumerate(cases(setup).items()):
        trainer = trainer_of(planned, setup.folder / str(number))
        for _ in range(WARM_UP):
            trainer.step()
        found = trace(trainer)
        close(trainer)
        waits = {event: count for event, count in found.items() if event in WAITS}
        copies = {event: count for event, count in found.items() if any(part in event for part in COPIES)}
        for what, events in (("waits for the device", waits), ("copies that make it wait", copies)):
            note = ", ".join(f"{event}: {count}" for event, count in events.items())
            yield Measurement(f"{name}: {what}, in a step", sum(events.values()) / STEPS, most=0, note=note)
        most = 1 if setup.device.type == "cuda" else None  # kernels for CPUs read numbers themselves
        yield Measurement(f"{name}: numbers read by the host, in a step", found[READ] / STEPS, most=most)


def cases(setup: Setup) -> dict[str, Experiment]:
    """Experiments that between them use everything a step can."""
    sizes: dict[str, Any] = setup.size(
        {"vocab_size": 512, "max_seq_len": 256, "n_layers": 2, "n_heads": 4, "dim": 256},
        {"vocab_size": 96, "max_seq_len": 32, "n_layers": 1, "n_heads": 2, "dim": 32},
    )
    muon = OptimizerConfig(lr=1e-3, muon=MuonConfig(lr=1e-3))
    models = {
        "GPT": GPTConfig(**sizes, dropout=0.1),
        "Llama, documents and window": LlamaConfig(**sizes, separator=0, sliding_window=16, global_every=2),
        "Llama, experts": LlamaConfig(**sizes, n_experts=4, bias_update_rate=1e-3),
    }
    shape: dict[str, Any] = {"seq_len": sizes["max_seq_len"], "batch_size": 4, "steps": 100}
    found = {
        name: experiment(setup, "waits", model, optimizer=muon, spike_threshold=1.0, micro_batch_size=2, **shape)
        for name, model in models.items()
    }
    fp16 = experiment(setup, "waits", models["GPT"], precision=setup.size("fp16", "fp32"), **shape)
    return {**found, "GPT, fp16": fp16}


def trainer_of(planned: Experiment, folder: Path) -> Trainer:
    """A trainer on data made for it."""
    folder.mkdir(parents=True)
    return make_trainer(planned, data_for(planned, folder / "data"), folder / "run")


def trace(trainer: Trainer) -> Counter[str]:
    """How often each event begins during some steps of the trainer."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler, record_function(REGION):
        for _ in range(STEPS):
            trainer.step()
    events = profiler.events() or ()
    region = next(event for event in events if event.name == REGION and event.device_type == DeviceType.CPU)
    inside = (event for event in events if region.time_range.start <= event.time_range.start <= region.time_range.end)
    return Counter(event.name for event in inside)
