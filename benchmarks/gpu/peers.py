"""Peers on the same device: nanoGPT, by its own functions, and Transformers, in the loop of nanoGPT's train.py."""

import ast
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import nanogpt_model
from benchmarks.store import token_files
from cleangpt.config import ModelConfig
from cleangpt.data.dataset import TokenDataset
from cleangpt.distributed.device import autocast, compute_dtype
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig

Loop = Callable[[int], float]
"""Takes a number of steps; returns the seconds of one."""


def synchronize(device: torch.device) -> None:
    """Waits for the device, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_loop(
    loss: Callable[[], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, planned: Experiment,
    device: torch.device,
) -> Loop:  # fmt: skip
    """A loop like that of nanoGPT's train.py, without its logging, in the precision of the experiment.

    Args:
        loss: takes the next batch; returns its mean loss.
        model: whose gradient is clipped.
        optimizer: fused where the device has that.
        planned: says how many micro-batches a step has.
        device: of the model.
    """
    training, clip_norm = planned.training, planned.optimizer.clip_norm or math.inf
    count = training.accumulation
    context = autocast(device, compute_dtype(device, training.precision))

    def loop(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            for _ in range(count):
                with context:
                    value = loss() / count
                value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return (time.perf_counter() - began) / steps

    return loop


def nanogpt(checkout: Path, planned: Experiment, store: TokenDataset, device: torch.device, compiled: bool) -> Loop:
    """nanoGPT's model and optimizer, and the `get_batch` of its train.py, which reads the same tokens."""
    model, optimizer = nanogpt_model(checkout, planned, device)
    data = store.folder.parent / "nanogpt"
    data.mkdir(exist_ok=True)
    (data / "train.bin").write_bytes(token_files(store.folder)[0].read_bytes())
    get_batch = function_of(
        checkout / "train.py", "get_batch", data_dir=str(data), block_size=planned.data.seq_len,
        batch_size=planned.data.batch_size, device=str(device), device_type=device.type,
    )  # fmt: skip
    called: Any = torch.compile(model) if compiled else model
    batch = get_batch("train")

    def loss() -> Tensor:
        nonlocal batch
        value: Tensor = called(*batch)[1]
        batch = get_batch("train")  # while the device computes, as there
        return value

    return train_loop(loss, model, optimizer, planned, device)


def function_of(script: Path, name: str, **variables: Any) -> Callable[..., Any]:
    """A function of a script, without running the script; `variables` are its globals besides the usual modules.

    Raises:
        UserError: the script does not define it.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise UserError(f"{script} has no function {name}; --peer is to be a checkout of nanoGPT")
    scope: dict[str, Any] = {"os": os, "np": np, "torch": torch, "math": math, "pickle": pickle, **variables}
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), str(script), "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def transformers_model(config: ModelConfig) -> Any:
    """A random model of Transformers of the same shape, with PyTorch's fused attention, on the default device."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa",
    }  # fmt: skip
    if isinstance(config, GPTConfig):
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        sizes |= {"n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.dim}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=config.max_seq_len or 0, **sizes))
    assert isinstance(config, LlamaConfig)
    sizes |= {"hidden_size": config.dim, "intermediate_size": config.mlp_size, "num_hidden_layers": config.n_layers}
    sizes |= {"num_attention_heads": config.n_heads, "num_key_value_heads": config.num_kv_heads}
    sizes |= {"tie_word_embeddings": config.tied, "max_position_embeddings": config.max_seq_len}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def transformers_loop(planned: Experiment, device: torch.device) -> Loop:
    """Transformers' model, not compiled, with PyTorch's fused AdamW, on batches that are on the device already."""
    with device:
        model = transformers_model(planned.model).train()
    settings, shape = planned.optimizer, (planned.data.batch_size, planned.data.seq_len)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True
    )
    batches = _random_batches(planned.model.vocab_size or 0, shape, device)

    def loss() -> Tensor:
        tokens, targets = next(batches)
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return train_loop(loss, model, optimizer, planned, device)


def _random_batches(vocab_size: int, shape: tuple[int, int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1), device=device)
        yield tokens[:, :-1], tokens[:, 1:]
