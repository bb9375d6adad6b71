"""What the rows train: models and experiments, at real and at toy size, and the data they are trained on."""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import Setup
from benchmarks.made import make_store
from cleangpt.config import DataConfig, ModelConfig, OptimizerConfig, SavingConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.data.dataset import TokenDataset
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig

GPT2_VOCABULARY, LLAMA_VOCABULARY = 50_257, 128_256
PADDED = 50_304
"""GPT-2's vocabulary, rounded up to a multiple of 64."""


def gpt2(setup: Setup) -> GPTConfig:
    """GPT-2 with 124M parameters, without biases, as nanoGPT trains it."""
    if setup.toy:
        return GPTConfig(vocab_size=96, max_seq_len=32, n_layers=2, n_heads=2, dim=32, bias=False)
    return GPTConfig(vocab_size=PADDED, max_seq_len=1024, n_layers=12, n_heads=12, dim=768, bias=False)


def llama_1b(setup: Setup, seq_len: int) -> LlamaConfig:
    """Llama 3.2 with 1.24 billion parameters."""
    if setup.toy:
        return toy_llama(seq_len, tied=True)
    return LlamaConfig(
        vocab_size=LLAMA_VOCABULARY, max_seq_len=seq_len, n_layers=16, n_heads=32, n_kv_heads=8, dim=2048,
        hidden_dim=8192, tied=True,
    )  # fmt: skip


def llama_8b_layers(setup: Setup, seq_len: int) -> LlamaConfig:
    """Four of the 32 layers of Llama 3 with 8 billion parameters, with its embedding and head."""
    if setup.toy:
        return toy_llama(seq_len)
    return LlamaConfig(
        vocab_size=LLAMA_VOCABULARY, max_seq_len=seq_len, n_layers=4, n_heads=32, n_kv_heads=8, dim=4096,
        hidden_dim=14336,
    )  # fmt: skip


def toy_llama(seq_len: int, **fields: Any) -> LlamaConfig:
    """As small as can be with everything in it."""
    sizes = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "dim": 32, "hidden_dim": 64}
    return LlamaConfig(vocab_size=96, max_seq_len=seq_len, **{**sizes, **fields})


def experiment(
    setup: Setup,
    name: str,
    model: ModelConfig,
    *,
    seq_len: int,
    batch_size: int,
    steps: int,
    optimizer: OptimizerConfig | None = None,
    **training: Any,
) -> Experiment:
    """An experiment whose macro-batches have `steps` steps, in bf16 on the GPU; it records little."""
    accumulation = training.get("accumulation", 1)
    fields = {"precision": setup.size("bf16", "fp32"), **training}
    return Experiment(
        name=name,
        corpus=Stdlib(),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size, val_samples=batch_size),
        model=model,
        optimizer=optimizer or OptimizerConfig(lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95)),
        training=TrainingConfig(
            macro_batches=100, batches_per_macro_batch=steps * accumulation, device=str(setup.device), **fields
        ),
        saving=SavingConfig(keep_snapshots=1),
        tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
    )


def speed_experiment(setup: Setup, name: str) -> Experiment:
    """The experiment behind a row of `speed.py`, which `plan.py` plans as well."""
    compiled = setup.size("blocks", "off")
    if name == "gpt2":
        return experiment(
            setup, "gpt2", gpt2(setup), seq_len=setup.size(1024, 32), batch_size=setup.size(32, 2),
            steps=setup.size(10, 2), accumulation=setup.size(4, 2), compile=setup.size("model", "off"),
        )  # fmt: skip
    long = name.endswith("8192")
    seq_len = setup.size(8192 if long else 4096, 32)
    model = llama_1b(setup, seq_len) if "1B" in name else llama_8b_layers(setup, seq_len)
    return experiment(
        setup, name.replace(" ", "_").replace(",", ""), model, seq_len=seq_len,
        batch_size=setup.size(2 if long else 4, 2), steps=setup.size(3, 2), accumulation=setup.size(4, 2),
        compile=compiled, loss_chunk=setup.size(8192, 16),
    )  # fmt: skip


SPEED_ROWS = ("gpt2", "llama 1B, 4096", "llama 1B, 8192", "llama 8B layers, 4096", "llama 8B layers, 8192")
"""The rows of which `speed_experiment` has the experiment."""


def data_for(planned: Experiment, folder: Path) -> TokenDataset:
    """Random tokens of the vocabulary of a model, as many as a few hundred batches need."""
    vocabulary = planned.model.vocab_size or 0
    vocabulary = GPT2_VOCABULARY if vocabulary == PADDED else vocabulary
    seq_len, batch_size = planned.data.seq_len, planned.data.batch_size
    tokens = max(100_000, min(1_000_000, 100 * seq_len * batch_size))
    return make_store(folder, tokens, vocabulary, val_tokens=max(10_000, 4 * seq_len))


def with_training(planned: Experiment, **fields: Any) -> Experiment:
    """The experiment with fields of its `training` changed."""
    return dataclasses.replace(planned, training=dataclasses.replace(planned.training, **fields))
