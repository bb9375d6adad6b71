"""The plan against throughput and memory that others have measured and published.

Source: torchtitan's repository, folder `benchmarks/`, files `llama3_h100_202412_torchtitan.md` (December 2024),
`asyncTP_llama3_h100_2025-06_torchtitan.md` and `llama3-8b_h200_202506_trainy-whitefiber.md` (both June 2025). All rows
are here that CleanGPT's strategies can express, with bf16 and, where given, fp8 in the blocks' linear layers. Where
torchtitan does otherwise than CleanGPT (what is kept for the backward pass, what is gathered, the loss), the counts of
`Workload` are replaced, by reckoning from its code; the constants of `planning/devices.py` are the same for all.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from cleangpt.distributed.datasheets import GIB, find_device
from cleangpt.distributed.layout import Layout
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.objectives import NextToken
from cleangpt.planning.memory import StepConfig, device_memory
from cleangpt.planning.timing import Machine, step_time
from cleangpt.planning.workload import Passes, Work, Workload, measure

SEQ_LEN = 8192
MODELS = {
    "8B": LlamaConfig(
        vocab_size=128256, max_seq_len=SEQ_LEN, n_layers=32, n_heads=32, n_kv_heads=8, dim=4096, hidden_dim=14336
    ),
    "70B": LlamaConfig(
        vocab_size=128256, max_seq_len=SEQ_LEN, n_layers=80, n_heads=64, n_kv_heads=8, dim=8192, hidden_dim=28672
    ),
}


@dataclass(frozen=True)
class Row:
    """A published row: what was run, tokens/s and device, and GiB reserved where it was published."""

    model: str
    device: str
    layout: Layout
    batch: int
    precision: str
    compiled: bool
    tokens: float
    gib: float | None
    selective: bool = True
    """Activation checkpointing by operation, else of every block."""
    loss_compiled: bool = False


FSDP_8, FSDP_128, TWO_D_256, TWO_D_64 = Layout(1, 8, 1), Layout(1, 128, 1), Layout(1, 32, 8), Layout(1, 8, 8)
ROWS = [
    Row("8B", "h100-500w", FSDP_8, 2, "bf16", False, 5762, 82.4),
    Row("8B", "h100-500w", FSDP_8, 2, "bf16", True, 6667, 77.0),
    Row("8B", "h100-500w", FSDP_8, 2, "fp8", True, 8532, 76.8),
    Row("8B", "h100-500w", FSDP_128, 2, "bf16", False, 5605, 67.0),
    Row("8B", "h100-500w", FSDP_128, 2, "bf16", True, 6514, 62.0),
    Row("8B", "h100-500w", FSDP_128, 2, "fp8", True, 8380, 61.8),
    Row("70B", "h100-500w", TWO_D_256, 16, "fp8", True, 829, 71.9, selective=False),
    Row("70B", "h100-500w", TWO_D_256, 16, "bf16", True, 597.3, None, selective=False, loss_compiled=True),
    Row("70B", "h100-500w", TWO_D_256, 16, "fp8", True, 809.8, None, selective=False, loss_compiled=True),
    Row("8B", "h100-500w", TWO_D_64, 12, "bf16", True, 4378, None, loss_compiled=True),
    Row("8B", "h100-500w", TWO_D_64, 12, "fp8", True, 5078.1, None, loss_compiled=True),
    Row("8B", "h200", Layout(1, 32, 1), 2, "fp8", True, 10938, 47.96, loss_compiled=True),
    Row("8B", "h200", Layout(1, 64, 1), 2, "fp8", True, 10753, 46.97, loss_compiled=True),
]  # fmt: skip


@cache
def counted(model: str, batch: int) -> Workload:
    with torch.device("meta"):
        built = Llama(MODELS[model])
    return measure(built, NextToken(), batch, SEQ_LEN, torch.bfloat16, gathered=True)


def selective(row: Row, block: Passes) -> Passes:
    """Of a block's products in their order (query, key, value, out, gate, up, down) every other result is kept, and
    that of attention, and the block's input. Compiled, the last product's result is not kept: nothing needs it."""
    config, tokens = MODELS[row.model], row.batch * SEQ_LEN
    dim, kv, hidden = config.dim, config.num_kv_heads * config.head_size, config.hidden_dim
    kept = dim + dim + kv + dim + hidden + (0 if row.compiled else dim)
    flops = 2 * tokens * (dim * kv + dim * dim + dim * hidden)
    again = replace(
        block.forward, matmul_flops=flops, attention_flops=0.0, communication=block.forward.communication / 2
    )
    again = replace(again, operands=block.forward.operands * flops / block.forward.matmul_flops)
    return Passes(
        block.forward, block.backward, saved_activations=tokens * (2 * kept + 4 * config.n_heads), recomputed=again
    )


def as_torchtitan(row: Row) -> tuple[Workload, Passes]:
    """What torchtitan does in a micro-batch, and in a block: each norm's result is gathered once, not by each of the
    layers that read it; a compiled loss passes the logits and their gradient in bf16; the loss over cut logits has four
    copies of them in fp32 at its peak (`torch/distributed/tensor/parallel/loss.py`)."""
    ours = counted(row.model, row.batch)
    exchange = Work(communication=4 * ours.block_input)
    forward = replace(ours.block.forward, communication=0.0) + exchange
    backward = replace(ours.block.backward, communication=0.0) + exchange
    work = replace(ours, block=Passes(forward, backward, ours.block.saved_activations), gathered=2 * ours.block_input)
    logits = 2.0 * row.batch * SEQ_LEN * 128256
    if row.layout.tensor > 1:
        work = replace(work, transient=6 * logits)
    if row.loss_compiled:
        forward, backward = (replace(work, bytes=work.fused_bytes) for work in (ours.rest.forward, ours.rest.backward))
        work = replace(work, rest=Passes(forward, backward, saved_activations=logits), transient=logits)
    return work, selective(row, work.block) if row.selective else work.recomputed_block()


def planned(row: Row) -> tuple[float, float]:
    """Tokens/s and device, and GiB."""
    work, block = as_torchtitan(row)
    machine = Machine(find_device(row.device), row.precision, row.compiled, per_node=8)
    blocks, step = [(work.blocks, block)], StepConfig(logits_shards=row.layout.tensor)
    memory = device_memory(work, blocks, row.layout, step, machine.weight_bytes)
    seconds = step_time(work, blocks, row.layout, step, machine).total
    return row.batch * SEQ_LEN / row.layout.tensor / seconds, memory.total / GIB


def table_row(row: Row) -> str:
    """As docs/planning.md has it."""
    tokens, gib = planned(row)
    layout = f"fsdp {row.layout.shards}" + (f" x tensor {row.layout.tensor}" if row.layout.tensor > 1 else "")
    published = "" if row.gib is None else f"{row.gib:.1f}"
    memory = "" if row.gib is None else f"{gib:.1f} ({gib / row.gib - 1:+.0%})"
    return (
        f"| {row.model} | {row.device} | {layout} | {row.precision}{', compiled' if row.compiled else ''} "
        f"| {row.tokens:,.0f} | {tokens:,.0f} ({tokens / row.tokens - 1:+.0%}) | {published} | {memory} |"
    )


@pytest.mark.slow
def test_nearly_all_published_rows_are_within_15_percent() -> None:
    for row in ROWS:
        tokens, gib = planned(row)
        # The one known exception, explained in docs/planning.md: small shards of matrices are slow to multiply in fp8.
        allowed = 0.25 if row.layout == TWO_D_64 and row.precision == "fp8" else 0.15
        assert tokens == pytest.approx(row.tokens, rel=allowed), table_row(row)
        assert row.gib is None or gib == pytest.approx(row.gib, rel=0.15), table_row(row)


def test_the_table_in_the_documents_is_this_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    (published,) = re.findall(r"^\| model \| device .*\n\|[-:| ]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert published.splitlines() == [table_row(row) for row in ROWS]
