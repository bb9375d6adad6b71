"""Tokens per second, MFU, memory and waiting for data in training, beside peers on the same device; snapshots."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from benchmarks.gpu.models import data_for, speed_experiment, with_training
from benchmarks.gpu.peers import Loop, nanogpt, synchronize, transformers_loop
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.made import close, make_trainer, train_macro_batch
from benchmarks.runner import interleave
from cleangpt.data.dataset import TokenDataset
from cleangpt.distributed.device import can_compile, peak_flops
from cleangpt.experiment import Experiment
from cleangpt.models.flops import flops_per_token
from cleangpt.training.trainer import Trainer

RATE, MEMORY = "tokens per second", "memory reserved"
"""Measurements that `plan.py` compares with the plan."""
WAIT_GOAL, PAUSE_GOAL, NANOGPT_GOAL = 0.5, 2.0, 1.15
PERIOD = 60.0
"""Seconds between two snapshots, for the share of training that they take."""


def gpt2(setup: Setup) -> Iterator[Measurement]:
    """GPT-2 with 124M parameters at 1,024 tokens, in turn with nanoGPT, then Transformers."""
    planned = speed_experiment(setup, "gpt2")
    peers: dict[str, Callable[[TokenDataset], Loop]] = {}
    if (checkout := setup.peer) is not None:
        compiled = can_compile(setup.device) and not setup.toy
        name = "nanoGPT, compiled" if compiled else "nanoGPT"
        peers[name] = lambda store: nanogpt(checkout, planned, store, setup.device, compiled)
    else:
        yield Measurement("nanoGPT, compiled", note="needs --peer")
    yield from compare(setup, planned, peers, rate_goal=setup.size(460_000, None), mfu_goal=50)
    yield from alone("Transformers", lambda: transformers_loop(planned, setup.device), planned, setup)


def llama_1b_4096(setup: Setup) -> Iterator[Measurement]:
    """Llama with 1.24 billion parameters at 4,096 tokens, beside Transformers."""
    planned = speed_experiment(setup, "llama 1B, 4096")
    yield from compare(setup, planned, {}, mfu_goal=55)
    # Both do not fit at once, and Transformers has all logits at once: one sample at a time, as many in a step.
    accumulation = planned.data.batch_size * planned.training.accumulation
    singly = dataclasses.replace(
        with_training(planned, accumulation=accumulation), data=dataclasses.replace(planned.data, batch_size=1)
    )
    yield from alone("Transformers", lambda: transformers_loop(singly, setup.device), singly, setup)


def llama_1b_8192(setup: Setup) -> Iterator[Measurement]:
    """The same at 8,192 tokens."""
    yield from compare(setup, speed_experiment(setup, "llama 1B, 8192"), {}, mfu_goal=55)


def llama_8b_layers_4096(setup: Setup) -> Iterator[Measurement]:
    """Four layers of Llama with 8 billion parameters at 4,096 tokens."""
    yield from compare(setup, speed_experiment(setup, "llama 8B layers, 4096"), {}, mfu_goal=55)


def llama_8b_layers_8192(setup: Setup) -> Iterator[Measurement]:
    """The same at 8,192 tokens."""
    yield from compare(setup, speed_experiment(setup, "llama 8B layers, 8192"), {}, mfu_goal=55)


def compare(
    setup: Setup, planned: Experiment, peers: Mapping[str, Callable[[TokenDataset], Loop]],
    *, rate_goal: float | None = None, mfu_goal: float | None = None,
) -> Iterator[Measurement]:  # fmt: skip
    """Ours as the trainer counts it, loading and bookkeeping included, then peers in turn with it."""
    store = data_for(planned, setup.folder / "data")
    reset_peak(setup.device)
    trainer = make_trainer(planned, store, setup.folder / "run")
    steps = planned.training.batches_per_macro_batch // planned.training.accumulation
    train_macro_batch(trainer)  # compiles
    first = train_macro_batch(trainer)
    yield memory_of(setup.device)
    loops: dict[str, Loop] = {}
    for name, make in peers.items():
        try:
            loops[name] = make(store)
            loops[name](1)
        except torch.OutOfMemoryError:
            loops.pop(name, None)
            yield Measurement(name, note="out of memory beside ours")
    measures: dict[str, Callable[[], tuple[float, float]]] = {"": lambda: train_macro_batch(trainer)}
    measures |= {name: partial(_without_wait, loop, steps) for name, loop in loops.items()}
    taken = interleave(measures, setup.size(3, 1), warm_up=False)
    ours = [*taken.pop(""), first]
    yield from rates(trainer, ours, rate_goal, mfu_goal if setup.device.type == "cuda" else None)
    tokens = step_tokens(planned)
    for name, times in taken.items():
        theirs = [seconds for seconds, _ in times]
        yield Measurement(f"{name}: {RATE}", tokens / statistics.median(theirs), "tokens/s")
        ratios = [other / (mine[0]) for mine, other in zip(ours, theirs, strict=False)]
        goal = NANOGPT_GOAL if name.startswith("nanoGPT") and not setup.toy else None
        yield Measurement(f"ours over {name}", statistics.median(ratios), "×", least=goal, note=spread(ratios))
    close(trainer)


def _without_wait(loop: Loop, steps: int) -> tuple[float, float]:
    return loop(steps), 0.0


def alone(name: str, make: Callable[[], Loop], planned: Experiment, setup: Setup) -> Iterator[Measurement]:
    """A peer by itself, once everything of ours has been freed."""
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        loop = make()
        loop(1)
        seconds = loop(setup.size(2, 1))
    except torch.OutOfMemoryError:
        yield Measurement(f"{name}: {RATE}", note="out of memory")
        return
    yield Measurement(f"{name}: {RATE}", step_tokens(planned) / seconds, "tokens/s", note="after ours, not in turn")


def rates(
    trainer: Trainer, taken: list[tuple[float, float]], rate_goal: float | None, mfu_goal: float | None
) -> Iterator[Measurement]:
    """Tokens per second, MFU and the share of time spent waiting for data, of steps as `train_macro_batch` has them."""
    throughput, device = trainer.recorder.throughput, trainer.device
    seconds = [step for step, _ in taken]
    samples = trainer.plan(trainer.position.samples).accumulation * trainer.length.batch_size
    every = [samples * throughput.seq_len / step for step in seconds]
    rate = statistics.median(every)
    yield Measurement(RATE, rate, "tokens/s", least=rate_goal, note=spread(every))
    peak = peak_flops(device)
    mfu = None if peak is None else 100 * rate * flops_per_token(trainer.model, throughput.seq_len) / peak
    yield Measurement("MFU", mfu, "%", least=mfu_goal, note="" if peak else "the device's peak is not known")
    waited = 100 * sum(wait for _, wait in taken) / sum(seconds)
    yield Measurement("waiting for data", waited, "%", most=WAIT_GOAL if device.type == "cuda" else None)


def spread(values: list[float]) -> str:
    """The least and the largest of some values."""
    return f"{min(values):,.4g} to {max(values):,.4g}"


def step_tokens(planned: Experiment) -> int:
    """Tokens of a step."""
    return planned.data.batch_size * planned.data.seq_len * planned.training.accumulation


def reset_peak(device: torch.device) -> None:
    """Forgets the largest use of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_of(device: torch.device) -> Measurement:
    """The most memory that PyTorch's allocator has reserved, of which tensors were a part."""
    if device.type != "cuda":
        return Measurement(MEMORY, note="only with CUDA")
    reserved, used = (
        read(device) / 2**30 for read in (torch.cuda.max_memory_reserved, torch.cuda.max_memory_allocated)
    )
    return Measurement(MEMORY, reserved, "GiB", note=f"{used:.1f} GiB in tensors")


def snapshots(setup: Setup) -> Iterator[Measurement]:
    """What a snapshot of weights and moments of GPT-2 costs: the pause, and slower steps while it is written."""
    planned = with_training(speed_experiment(setup, "gpt2"), compile="off")
    trainer = make_trainer(planned, data_for(planned, setup.folder / "data"), setup.folder / "run")
    steps = planned.training.batches_per_macro_batch // planned.training.accumulation
    train_macro_batch(trainer)
    plain = min(train_macro_batch(trainer)[0] for _ in range(2))
    for what in ("the first snapshot", "a later snapshot"):
        train_macro_batch(trainer)
        synchronize(setup.device)
        began = time.perf_counter()
        trainer.save_snapshot()
        pause = time.perf_counter() - began
        meanwhile = train_macro_batch(trainer)[0]
        trainer.saver.snapshots.wait()
        slower = max(0.0, meanwhile - plain) * steps
        yield Measurement(f"{what}: pause", 1000 * pause, "ms")
        yield Measurement(f"{what}: steps slower while it is written, in all", 1000 * slower, "ms")
        share = 100 * (pause + slower) / PERIOD
        most = PAUSE_GOAL if what.startswith("a later") and not setup.toy else None
        yield Measurement(f"{what}, once a minute: share of training", share, "%", most=most)
    trainer.saver.snapshots.close()
    close(trainer)
