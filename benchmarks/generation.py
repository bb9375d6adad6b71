"""Generation: seconds per token, with a KV cache, against others with the same weights.

A GPT-2 of 6 × 384 with a byte vocabulary, 10.8 million parameters in fp32, continues 16 tokens greedily. For one
sequence, all weights are read from memory for every token: `products alone` multiplies by each matrix once, in PyTorch,
and does nothing else. The overhead per token shows in a model of 6 × 48.
Hugging Face's `generate` has a cache, nanoGPT's (`--peer`) has none; llama.cpp runs the exported file, where
llama-cpp-python is installed, its cache in fp32 too. Compilation is not timed.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import Row, Setup, interleave
from benchmarks.step import nanogpt_module
from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.distributed.device import can_compile
from cleangpt.inference.engine import Engine
from cleangpt.interchange.export import export
from cleangpt.interchange.gpt import to_huggingface
from cleangpt.models.gpt import GPT, GPTConfig

CPU = torch.device("cpu")
PROMPT = 16
HUGGING_FACE_GOAL, LLAMA_CPP_GOAL = 1 / 3, 1.0
LLAMA_CPP = "llama.cpp, fp32"
Generate = Callable[[int, int], float]
"""From a batch size and a number of tokens per sequence: generates them; returns the seconds of one step."""


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    count = 8 if setup.quick else 96
    rows = compare(GPT(config(48)), 1, 2, count, {}, setup, "6 × 48, ")
    model = GPT(config(384))
    checkpoint = Checkpoint(setup.folder, model.config, ByteTokenizer(), model.state_dict(), {})
    peers: dict[str, Callable[[], Generate]] = {}
    if setup.peer is not None:
        peers["nanoGPT, no cache"] = partial(_nanogpt, setup.peer, model)
    rows += compare(model, 1, 2, count, peers, setup)
    rows += compare(model, 16, 2, count, peers, setup)
    others: dict[str, Callable[[], Generate]] = {}
    if importlib.util.find_spec("llama_cpp") is not None:
        others[LLAMA_CPP] = partial(_llama_cpp, checkpoint, setup.folder / "model.gguf")
    return rows + compare(model, 1, 1, count, others, setup)


def config(dim: int) -> GPTConfig:
    """The model's."""
    return GPTConfig(vocab_size=257, max_seq_len=256, n_layers=6, n_heads=6, dim=dim)


def compare(
    model: GPT, batch: int, threads: int, count: int, peers: dict[str, Callable[[], Generate]], setup: Setup,
    what: str = "",
) -> list[Row]:  # fmt: skip
    """Ours, plain and compiled, against `peers`, Hugging Face and the products alone, on a number of threads."""
    measures: dict[str, Generate] = {"ours": _ours(model, compiled=False)}
    if can_compile(CPU) and not setup.quick:
        measures["compiled"] = _ours(model, compiled=True)
    measures |= {"Hugging Face": _hugging_face(model)}
    measures |= {name: make() for name, make in peers.items()}
    measures |= {"products alone": _products(model)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = interleave({name: partial(one, batch, count) for name, one in measures.items()}, setup.repetitions)
    finally:
        torch.set_num_threads(before)
    sides = {name: taken.pop(name) for name in ("ours", "compiled") if name in taken}
    what += f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
    goals = {
        "Hugging Face": HUGGING_FACE_GOAL if batch == 1 and threads > 1 and model.config.dim == 384 else None,
        "llama.cpp, fp32": LLAMA_CPP_GOAL,
    }
    return [
        Row(f"{what}{': compiled' * (name == 'compiled')}", "s", ours, peer, theirs, goals.get(peer))
        for (name, ours), (peer, theirs) in itertools.product(sides.items(), taken.items())
    ]


def prompts(batch: int) -> list[list[int]]:
    """Different prompts, since the engine prefills equal ones only once."""
    return [[row] * PROMPT for row in range(batch)]


def _timed(steps: Callable[[int, int], Any]) -> Generate:
    def measure(batch: int, count: int) -> float:
        start = time.perf_counter()
        steps(batch, count)
        return (time.perf_counter() - start) / count

    return measure


def _ours(model: GPT, compiled: bool) -> Generate:
    engine = Engine(model.eval(), CPU, compiled=compiled)
    return _timed(lambda batch, count: engine.generate(prompts(batch), max_new_tokens=count))


def _hugging_face(model: GPT) -> Generate:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = model.config
    entries: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "vocab_size": ours.vocab_size}
    theirs: Any = GPT2LMHeadModel(GPT2Config(n_positions=256, n_layer=6, n_head=6, n_embd=ours.dim, **entries))
    theirs.eval().load_state_dict(to_huggingface(ours, model.state_dict()), strict=False)

    def steps(batch: int, count: int) -> None:
        prompts = torch.zeros(batch, PROMPT, dtype=torch.long)
        theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    return _timed(steps)


def _nanogpt(checkout: Path, model: GPT) -> Generate:
    module, ours = nanogpt_module(checkout), model.config
    theirs = module.GPT(
        module.GPTConfig(block_size=256, vocab_size=ours.vocab_size, n_layer=6, n_head=6, n_embd=ours.dim, dropout=0.0)
    ).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = to_huggingface(ours, model.state_dict())
    theirs.load_state_dict(
        {name: tensor.t() if name.endswith(linear) else tensor for name, tensor in weights.items()}, strict=False
    )
    return _timed(lambda batch, count: theirs.generate(torch.zeros(batch, PROMPT, dtype=torch.long), count, top_k=1))


def _llama_cpp(checkpoint: Checkpoint, path: Path) -> Generate:
    import llama_cpp

    export(checkpoint, "gguf", path)
    threads = torch.get_num_threads()
    theirs: Any = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, n_threads_batch=threads, type_k=0, type_v=0, verbose=False
    )

    def steps(batch: int, count: int) -> None:
        theirs.reset()
        for _ in itertools.islice(theirs.generate([0] * PROMPT, temp=0.0), count):
            pass

    return _timed(steps)


def _products(model: GPT) -> Generate:
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "position" not in name]

    @torch.no_grad()
    def steps(batch: int, count: int) -> Tensor:
        inputs = {matrix.shape[1]: torch.ones(batch, matrix.shape[1]) for matrix in matrices}
        for _ in range(count):
            for matrix in matrices:
                product = F.linear(inputs[matrix.shape[1]], matrix)
        return product

    return _timed(steps)
