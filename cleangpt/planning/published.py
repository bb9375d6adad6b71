"""The plan beside throughput and memory that others have measured and published.

All rows of torchtitan's pages are here that CleanGPT's strategies can express: those without pipeline, context or
asynchronous tensor parallelism. Where torchtitan does otherwise than CleanGPT (what is kept for the backward pass, what
is gathered, the loss), the counts of `Workload` are replaced, by reckoning from its code; what is assumed of a device
is the same for all its rows.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from rich.table import Table

from cleangpt.distributed.datasheets import GIB, find_device
from cleangpt.distributed.layout import Layout
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.models.meta import on_meta
from cleangpt.objectives import NextToken
from cleangpt.planning.memory import Blocks, StepConfig, device_memory
from cleangpt.planning.timing import Machine, step_time
from cleangpt.planning.workload import Passes, Work, Workload, measure
from cleangpt.screen import Screen

MODELS = {
    "8B": LlamaConfig(vocab_size=128256, n_layers=32, n_heads=32, n_kv_heads=8, dim=4096, hidden_dim=14336),
    "70B": LlamaConfig(vocab_size=128256, n_layers=80, n_heads=64, n_kv_heads=8, dim=8192, hidden_dim=28672),
    "405B": LlamaConfig(vocab_size=128256, n_layers=126, n_heads=128, n_kv_heads=8, dim=16384, hidden_dim=53248),
    "2 13B": LlamaConfig(vocab_size=32000, n_layers=40, n_heads=40, dim=5120, hidden_dim=13824),
    "2 70B": LlamaConfig(vocab_size=32000, n_layers=80, n_heads=64, n_kv_heads=8, dim=8192, hidden_dim=28672),
}
"""Llama 3 and 3.1 by their size, Llama 2 with a 2 before it."""

SOURCES = {
    "2024-04": "docs/performance.md at commit 1ea476e, 64 A100 of 80 GB",
    "2024-08": "docs/performance.md at commit 3faaa1a, 128 H100 with a power limit",
    "2024-12": "benchmarks/llama3_h100_202412_torchtitan.md",
    "2025-06": "benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md",
    "2025-06, Trainy": "benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md",
}
"""Pages of torchtitan's repository, https://github.com/pytorch/torchtitan, by the month of their measurements."""

Kept = Literal["all", "layers", "operations", "inputs"]
"""What is kept for the backward pass: all activations; those of every second block; of every block the results of
attention and of every second product; the inputs of blocks alone."""


@dataclass(frozen=True)
class Row:
    """A published row: what was run, tokens/s and device, and GiB reserved where it was published."""

    source: str
    """A key of SOURCES."""
    model: str
    """A key of MODELS."""
    device: str
    layout: Layout
    batch: int
    """Samples per data-parallel rank."""
    precision: str
    compiled: bool
    kept: Kept
    tokens: float
    gib: float | None = None
    seq_len: int = 8192

    @property
    def loss_compiled(self) -> bool:
        """Since 2025, torchtitan compiles the loss too."""
        return self.source >= "2025"


_64, _8, _128 = Layout(1, 64, 1), Layout(1, 8, 1), Layout(1, 128, 1)
ROWS = [
    Row("2024-04", "8B", "a100", _64, 1, "bf16", False, "layers", 2904),
    Row("2024-04", "8B", "a100", _64, 1, "bf16", False, "operations", 2973),
    Row("2024-04", "70B", "a100", _64, 1, "bf16", False, "inputs", 331),
    Row("2024-04", "2 13B", "a100", _64, 2, "bf16", False, "all", 2162, seq_len=4096),
    Row("2024-04", "2 13B", "a100", _64, 2, "bf16", False, "layers", 1914, seq_len=4096),
    Row("2024-04", "2 13B", "a100", _64, 2, "bf16", False, "operations", 1904, seq_len=4096),
    Row("2024-04", "2 70B", "a100", _64, 1, "bf16", False, "operations", 355, seq_len=4096),
    Row("2024-04", "2 70B", "a100", _64, 2, "bf16", False, "inputs", 353, seq_len=4096),
    Row("2024-08", "405B", "h100-500w", Layout(1, 16, 8), 2, "bf16", True, "inputs", 109),
    Row("2024-08", "405B", "h100-500w", Layout(1, 16, 8), 2, "fp8", True, "inputs", 177),
    Row("2024-12", "8B", "h100-500w", _8, 2, "bf16", False, "operations", 5762, 82.4),
    Row("2024-12", "8B", "h100-500w", _8, 2, "bf16", True, "operations", 6667, 77.0),
    Row("2024-12", "8B", "h100-500w", _8, 2, "fp8", True, "operations", 8532, 76.8),
    Row("2024-12", "8B", "h100-500w", _8, 1, "fp8", True, "inputs", 3890, 83.9, seq_len=32768),
    Row("2024-12", "8B", "h100-500w", _128, 2, "bf16", False, "operations", 5605, 67.0),
    Row("2024-12", "8B", "h100-500w", _128, 2, "bf16", True, "operations", 6514, 62.0),
    Row("2024-12", "8B", "h100-500w", _128, 2, "fp8", True, "operations", 8380, 61.8),
    Row("2024-12", "70B", "h100-500w", Layout(1, 32, 8), 16, "fp8", True, "inputs", 829, 71.9),
    Row("2025-06", "70B", "h100-500w", Layout(1, 32, 8), 16, "bf16", True, "inputs", 597.3),
    Row("2025-06", "70B", "h100-500w", Layout(1, 32, 8), 16, "fp8", True, "inputs", 809.8),
    Row("2025-06", "8B", "h100-500w", Layout(1, 8, 8), 12, "bf16", True, "operations", 4378),
    Row("2025-06", "8B", "h100-500w", Layout(1, 8, 8), 12, "fp8", True, "operations", 5078.1),
    Row("2025-06, Trainy", "8B", "h200", Layout(1, 32, 1), 2, "fp8", True, "operations", 10938, 47.96),
    Row("2025-06, Trainy", "8B", "h200", _64, 2, "fp8", True, "operations", 10753, 46.97),
]


def show_published() -> None:
    """Prints the table of docs/planning.md."""
    console = Screen(width=max(Screen().width, 150))  # so that no cell is truncated
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:6] else "right")
    for row in ROWS:
        table.add_row(*cells(row))
    console.print(table)
    for name, page in SOURCES.items():
        console.print(f"{name}: torchtitan's {page}", highlight=False)


COLUMNS = (
    "source", "model", "device", "strategy", "precision", "kept", "tokens/s", "planned", "GiB", "planned",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """What the table says of a row, in the order of COLUMNS."""
    tokens, gib = planned(row)
    layout = f"fsdp {row.layout.shards}" + (f" x tensor {row.layout.tensor}" if row.layout.tensor > 1 else "")
    return (
        row.source, row.model + (", 32,768 tokens" if row.seq_len == 32768 else ""), row.device, layout,
        f"{row.precision}{', compiled' if row.compiled else ''}", row.kept,
        f"{row.tokens:,.0f}", f"{tokens:,.0f} ({tokens / row.tokens - 1:+.0%})",
        "" if row.gib is None else f"{row.gib:.1f}",
        "" if row.gib is None else f"{gib:.1f} ({gib / row.gib - 1:+.0%})",
    )  # fmt: skip


def planned(row: Row) -> tuple[float, float]:
    """Tokens/s and device, and GiB."""
    work, blocks = as_torchtitan(row)
    machine = Machine(find_device(row.device), row.precision, row.compiled, per_node=8)
    step = StepConfig(logits_shards=row.layout.tensor)
    memory = device_memory(work, blocks, row.layout, step, machine.weight_bytes)
    seconds = step_time(work, blocks, row.layout, step, machine).total
    return row.batch * row.seq_len / row.layout.tensor / seconds, memory.total / GIB


# What torchtitan does -------------------------------------------------------------------------------------------------


@cache
def _counted(model: str, batch: int, seq_len: int) -> Workload:
    with on_meta():
        built = Llama(replace(MODELS[model], max_seq_len=seq_len))
    return measure(built, NextToken(), batch, seq_len, torch.bfloat16, gathered=True)


def as_torchtitan(row: Row) -> tuple[Workload, Blocks]:
    """What torchtitan does in a micro-batch, and its blocks.

    Each norm's result is gathered once, not by each of the layers that read it; a compiled loss passes the logits and
    their gradient in bf16; the loss over sharded logits has four copies of them in fp32 at its peak
    (`torch/distributed/tensor/parallel/loss.py`).
    """
    ours = _counted(row.model, row.batch, row.seq_len)
    exchange = Work(communication=4 * ours.block_input)
    forward = replace(ours.block.forward, communication=0.0) + exchange
    backward = replace(ours.block.backward, communication=0.0) + exchange
    work = replace(ours, block=Passes(forward, backward, ours.block.saved_activations), gathered=2 * ours.block_input)
    logits = 2.0 * row.batch * row.seq_len * (MODELS[row.model].vocab_size or 0)
    if row.layout.tensor > 1:
        work = replace(work, transient=6 * logits)
    if row.loss_compiled:
        work = work.with_compiled_loss()
    return work, _blocks(row, work)


def _blocks(row: Row, work: Workload) -> Blocks:
    """The blocks of each kind, by what they keep."""
    if row.kept == "operations":
        return [(work.blocks, _every_second_product(row, work.block))]
    recomputed = {"all": 0, "layers": work.blocks // 2, "inputs": work.blocks}[row.kept]
    return [(work.blocks - recomputed, work.block), (recomputed, work.recomputed_block())]


def _every_second_product(row: Row, block: Passes) -> Passes:
    """Of a block's products in their order (query, key, value, out, gate, up, down) every other result is kept, and
    that of attention, and the block's input. Compiled, the last product's result is not kept: nothing needs it."""
    config, tokens = MODELS[row.model], row.batch * row.seq_len
    dim, kv, hidden = config.dim, config.num_kv_heads * config.head_size, config.mlp_size
    kept = dim + dim + kv + dim + hidden + (0 if row.compiled else dim)
    flops = 2 * tokens * (dim * kv + dim * dim + dim * hidden)
    again = replace(
        block.forward, matmul_flops=flops, attention_flops=0.0, communication=block.forward.communication / 2
    )
    again = replace(again, operands=block.forward.operands * flops / block.forward.matmul_flops)
    return Passes(
        block.forward, block.backward, saved_activations=tokens * (2 * kept + 4 * config.n_heads), recomputed=again
    )
