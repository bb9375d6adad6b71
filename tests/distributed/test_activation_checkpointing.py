"""Activation checkpointing changes nothing but memory and time: full recomputation and selective."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from torch.utils.flop_counter import FlopCounterMode

from cleangpt.config import ModelConfig, TrainingConfig
from cleangpt.distributed.parallelize import apply_activation_checkpointing, keep_products
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.objectives import NextToken
from cleangpt.planning.memory import kinds_of_blocks
from cleangpt.planning.workload import measure
from tests.losses import next_token

LLAMA = LlamaConfig(vocab_size=96, max_seq_len=32, n_layers=3, n_heads=4, n_kv_heads=2, dim=32, hidden_dim=48)
GPT = GPTConfig(vocab_size=96, max_seq_len=32, n_layers=3, n_heads=4, dim=32)
CONFIGS: dict[str, ModelConfig] = {
    "gpt": GPT,
    "gpt with dropout": replace(GPT, dropout=0.3),
    "gpt scaled by layer": replace(GPT, scale_attention_by_layer=True),
    "llama": LLAMA,
    "windows": replace(LLAMA, sliding_window=5, global_every=2, dropout=0.2),
    "experts": replace(LLAMA, n_experts=4, n_shared_experts=1, qk_norm=True),
    "value residuals": replace(LLAMA, value_residual=True, activation="relu2"),
}
TOKENS = torch.randint(96, (3, 33), generator=torch.Generator().manual_seed(0))
WAYS: dict[str, tuple[int | None, bool]] = {"none": (None, False), "full": (1, False), "selective": (1, True)}


def loss_of(config: ModelConfig, way: str) -> tuple[LanguageModel, torch.Tensor]:
    """A model with the same weights whatever the way, and its loss with the same dropout."""
    torch.manual_seed(0)
    model = build_model(config)
    apply_activation_checkpointing(model, *WAYS[way])
    return model, next_token(model, TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.mark.default(4)
@pytest.mark.parametrize("way", ["full", "selective"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_bit_for_bit_those_of_a_pass_that_keeps_everything(name: str, way: str) -> None:
    (kept, loss), (recomputed, other) = loss_of(CONFIGS[name], "none"), loss_of(CONFIGS[name], way)
    assert torch.equal(loss, other)
    expected = torch.autograd.grad(loss, list(kept.parameters()))
    torch.manual_seed(1)
    found = torch.autograd.grad(other, list(recomputed.parameters()))
    assert all(map(torch.equal, expected, found))


@pytest.mark.default(1)
@pytest.mark.parametrize("name", ["gpt", "llama", "experts"])
def test_selective_recomputation_computes_no_product_twice(name: str) -> None:
    flops = {}
    for way in WAYS:
        with FlopCounterMode(display=False) as counter:
            model, loss = loss_of(CONFIGS[name], way)
            torch.autograd.grad(loss, list(model.parameters()))
        flops[way] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < flops["full"]


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that were made while active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_flatten(args)[0] if isinstance(leaf, torch.Tensor)}
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in given:
                self.sizes[key] = leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self.sizes.pop, key, None)
        return result


@pytest.mark.default(1)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_selective_recomputation_keeps_what_a_plan_counts(name: str) -> None:
    kept = {}
    for way in WAYS:
        torch.manual_seed(0)
        model = build_model(CONFIGS[name])
        apply_activation_checkpointing(model, *WAYS[way])
        with Live() as live:
            loss = next_token(model, TOKENS[:, :-1], TOKENS[:, 1:])
            kept[way] = sum(live.sizes.values())
        del loss
    assert kept["full"] < kept["selective"] < kept["none"]
    with torch.device("meta"):
        model = build_model(CONFIGS[name])
    work = measure(model, NextToken(), 3, 32, torch.float32, gathered=False)
    planned = work.rest.saved_activations
    planned += sum(count * passes.saved_activations for count, passes in kinds_of_blocks(work, 1, selective=True))
    assert kept["selective"] == pytest.approx(planned, rel=0.03)


def test_attention_with_dropout_is_recomputed_since_it_draws_random_numbers() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    context, tensors = SelectiveCheckpointContext(is_recompute=False), [torch.empty(0)] * 3
    assert keep_products(context, attention, *tensors, 0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert keep_products(context, attention, *tensors, dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert keep_products(context, attention, *tensors) == CheckpointPolicy.MUST_SAVE
    assert keep_products(context, torch.ops.aten.mm.default, *tensors[:2]) == CheckpointPolicy.MUST_SAVE
    assert keep_products(context, torch.ops.aten.silu.default, tensors[0]) == CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_recomputation_of_no_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.recompute is 'selective'; allowed without .*recompute_every: full"):
        TrainingConfig(steps=1, batches_per_macro_batch=1, recompute="selective")
