"""Generation: tokens per second of GPT-2 in bf16, beside Transformers' `generate` with a static cache, compiled.

Our engine records the decoding of a batch that stays the same in a CUDA graph, as Transformers does with a static
cache; `compiled` compiles what is recorded.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.models import gpt2
from benchmarks.gpu.peers import synchronize, transformers_model
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.runner import interleave
from cleangpt.distributed.device import can_compile
from cleangpt.inference.engine import Engine
from cleangpt.models.gpt import GPT

BATCH_1_GOAL = 3.0
Generate = Callable[[list[list[int]], int], int]
"""From prompts and a number of tokens for each: generates them, returns how many there are."""


def generation(setup: Setup) -> Iterator[Measurement]:
    """Batches of 1, 16 and 64."""
    count, prompt = setup.size((128, 32), (8, 4))
    torch.manual_seed(0)
    dtype = setup.size(torch.bfloat16, torch.float32)
    model = GPT(gpt2(setup)).to(setup.device, dtype).eval()
    peer = transformers_model(model.config).to(setup.device, dtype).eval()
    sides: dict[str, Generate] = {"ours": ours(Engine(model, setup.device))}
    if can_compile(setup.device) and not setup.toy:
        sides["ours, compiled"] = ours(Engine(model, setup.device, compiled=True))
    sides["Transformers"] = theirs(peer, setup.device, None)
    sides["Transformers, static cache, compiled"] = theirs(peer, setup.device, "static")
    for batch in setup.size((1, 16, 64), (1, 2)):
        prompts = torch.randint(1, 90, (batch, prompt)).tolist()
        measures: dict[str, Callable[[], float]] = {}
        for name, generate in list(sides.items()):
            try:
                generate(prompts, count)  # compiles
                measures[name] = partial(rate, generate, prompts, count, setup.device)
            except Exception as error:  # a version of Transformers that cannot do this with this model
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
                yield Measurement(f"batch {batch}: {name}", note=reason)
        taken = interleave(measures, setup.size(2, 1), warm_up=False)
        for name, rates in taken.items():
            yield Measurement(f"batch {batch}: {name}", statistics.median(rates), "tokens/s")
        mine = max(taken[name] for name in taken if name.startswith("ours"))
        for name in (name for name in taken if not name.startswith("ours")):
            ratio = statistics.median(a / b for a, b in zip(mine, taken[name], strict=True))
            least = BATCH_1_GOAL if batch == 1 and "static" in name and not setup.toy else None
            yield Measurement(f"batch {batch}: our best over {name}", ratio, "×", least=least)


def ours(engine: Engine) -> Generate:
    """Our engine, greedily."""

    def generate(prompts: list[list[int]], count: int) -> int:
        return sum(len(one.tokens) for one in engine.generate(prompts, max_new_tokens=count))

    return generate


def theirs(model: Any, device: torch.device, cache: str | None) -> Generate:
    """Transformers' `generate`, greedily; with a static cache it compiles by itself on CUDA."""

    def generate(prompts: list[list[int]], count: int) -> int:
        tokens = torch.tensor(prompts, device=device)
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, eos_token_id=None, cache_implementation=cache,
        )  # fmt: skip
        return int(found[:, tokens.shape[1] :].numel())

    return generate


def rate(generate: Generate, prompts: list[list[int]], count: int, device: torch.device) -> float:
    """Tokens per second."""
    synchronize(device)
    began = time.perf_counter()
    made = generate(prompts, count)
    synchronize(device)
    return made / (time.perf_counter() - began)
