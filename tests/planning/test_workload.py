"""What is counted on fake tensors is what a real pass on a CPU does."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cleangpt.distributed.datasheets import find_device
from cleangpt.distributed.layout import Layout
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.objectives import NextToken
from cleangpt.planning.memory import StepConfig, device_memory, kinds_of_blocks, static_bytes
from cleangpt.planning.timing import Machine
from cleangpt.planning.workload import Work, Workload, measure
from tests.losses import next_token

BATCH, SEQ_LEN = 3, 32
CONFIGS = [
    GPTConfig(vocab_size=96, max_seq_len=32, n_layers=3, n_heads=4, dim=32),
    LlamaConfig(vocab_size=96, max_seq_len=32, n_layers=3, n_heads=4, n_kv_heads=2, dim=32, hidden_dim=48),
]
each_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


def counted(config: GPTConfig | LlamaConfig, dtype: torch.dtype = torch.float32, gathered: bool = False) -> Workload:
    with torch.device("meta"):
        model = build_model(config)
    return measure(model, NextToken(), BATCH, SEQ_LEN, dtype, gathered)


def total(workload: Workload) -> tuple[Work, float]:
    """Work of both passes and bytes kept, of the whole model."""
    block, rest = workload.block, workload.rest
    work = (block.forward + block.backward) * workload.blocks + rest.forward + rest.backward
    return work, block.saved_activations * workload.blocks + rest.saved_activations


@pytest.mark.default(1)
@each_model
def test_products_of_matrices_are_those_that_pytorch_counts(config: GPTConfig | LlamaConfig) -> None:
    with torch.device("meta"):
        model, tokens = build_model(config), torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            next_token(model, tokens, tokens).backward()
    by_operation = counter.get_flop_counts()["Global"]
    linear = {torch.ops.aten.mm, torch.ops.aten.addmm}
    expected = sum(flops for operation, flops in by_operation.items() if operation in linear)
    assert total(counted(config))[0].matmul_flops == expected > 0


@pytest.mark.default(1)
@each_model
def test_attention_is_half_of_the_square_forward_and_two_and_a_half_times_that_backward(
    config: GPTConfig | LlamaConfig,
) -> None:
    forward = 4 * BATCH * SEQ_LEN**2 * config.dim / 2 * config.n_layers
    assert total(counted(config))[0].attention_flops == pytest.approx(3.5 * forward)


@pytest.mark.default(1)
@each_model
def test_saved_activations_are_those_of_a_real_pass(config: GPTConfig | LlamaConfig) -> None:
    model = build_model(config)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 96, (BATCH, SEQ_LEN))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token(model, tokens, tokens)
    assert total(counted(config))[1] == pytest.approx(sum(kept.values()), rel=0.01)
    assert loss.requires_grad


@pytest.mark.default(1)
@each_model
def test_state_is_weights_gradients_and_moments(config: GPTConfig | LlamaConfig) -> None:
    model = build_model(config)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)
    next_token(model, tokens, tokens).backward()
    optimizer.step()
    real = sum(2 * parameter.nbytes for parameter in model.parameters())
    real += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert static_bytes(counted(config).parameters, Layout()) == real
    assert static_bytes(counted(config).parameters, Layout(2, 4, 2)) == real / 8


@pytest.mark.slow
def test_depth_changes_nothing_but_the_number_of_blocks() -> None:
    deep = GPTConfig(vocab_size=96, max_seq_len=32, n_layers=1, n_heads=4, dim=32)
    assert counted(deep).block == counted(CONFIGS[0]).block
    assert counted(deep).rest == counted(CONFIGS[0]).rest


@pytest.mark.slow
def test_autocast_copies_the_weights_and_gathering_does_not() -> None:
    autocast, gathered = (counted(CONFIGS[0], torch.bfloat16, whether) for whether in (False, True))
    matrices = sum(parameter.numel() for parameter in GPT(CONFIGS[0]).blocks[0].parameters() if parameter.dim() == 2)
    assert autocast.block.saved_activations - gathered.block.saved_activations > 2 * matrices


def test_recomputation_saves_only_a_blocks_input() -> None:
    work = counted(CONFIGS[0])
    every, half = (
        device_memory(work, kinds_of_blocks(work, number), Layout(), StepConfig(), 4).activations for number in (1, 2)
    )
    assert every == 3 * 4 * BATCH * SEQ_LEN * 32
    assert half == pytest.approx(2 * every / 3 + work.block.saved_activations)


def test_a_sharded_model_accumulates_unsharded_gradients() -> None:
    work = counted(CONFIGS[0])
    once, twice = (
        device_memory(work, kinds_of_blocks(work, None), Layout(1, 4), StepConfig(number), 4).gradients
        for number in (1, 2)
    )
    assert twice - once == 4 * work.parameters


def test_a_small_model_waits_for_kernel_launches() -> None:
    machine = Machine(find_device("h100"), "bf16", compiled=False, per_node=8)
    tiny, large = Work(matmul_flops=1e3, kernels=100), Work(matmul_flops=1e15, kernels=100)
    assert machine.seconds(tiny, True) == pytest.approx(100 * 5e-6)
    assert machine.seconds(large, True) == pytest.approx(1e15 / (0.5 * 989e12))


def test_the_model_has_all_its_blocks_afterwards() -> None:
    with torch.device("meta"):
        model = build_model(CONFIGS[0])
    names = [name for name, _ in model.named_parameters()]
    measure(model, NextToken(), BATCH, SEQ_LEN, torch.float32, gathered=False)
    assert [name for name, _ in model.named_parameters()] == names and len(model.layers()) == 3


@pytest.mark.slow
def test_a_mixture_of_experts_is_planned_with_tokens_spread_evenly() -> None:
    config = LlamaConfig(
        vocab_size=96, max_seq_len=32, n_layers=2, n_heads=4, dim=32, hidden_dim=48, n_experts=4, experts_per_token=2
    )
    dense = LlamaConfig(vocab_size=96, max_seq_len=32, n_layers=2, n_heads=4, dim=32, hidden_dim=96)
    router = 3 * 2 * BATCH * SEQ_LEN * 32 * 4
    assert counted(config).block.forward.matmul_flops - router / 3 == counted(dense).block.forward.matmul_flops


@pytest.mark.slow
def test_scalar_heads_are_counted() -> None:
    with torch.device("meta"):
        plain, model = build_model(CONFIGS[0]), build_model(CONFIGS[0], ["value"])
    parameters = [measure(one, NextToken(), 1, 8, torch.float32, False).parameters for one in (plain, model)]
    assert parameters[1] - parameters[0] == CONFIGS[0].dim


class Blockless(LanguageModel):
    pass


class WithPatches(GPT):
    inputs = frozenset({"patches"})


def test_what_cannot_be_run_on_tokens_alone_is_refused_in_one_line() -> None:
    for model, message in (
        (Blockless(CONFIGS[0]), "Blockless cannot be planned: its `layers` are empty"),
        (WithPatches(CONFIGS[0]), "WithPatches cannot be planned: it reads patches"),
    ):
        with pytest.raises(UserError, match=message):
            measure(model, NextToken(), 1, 1, torch.float32, gathered=False)


def test_compiled_a_block_saves_its_weights_and_what_products_write_and_the_loss_one_copy_of_the_logits() -> None:
    """As an H200 had it: 15.6 GiB for GPT-2 with 32 samples of 1,024 tokens in bf16, of which 1.9 are weights and the
    like, where 31 would be needed if every operation saved what it reads."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304, max_seq_len=1024, n_layers=12, n_heads=12, dim=768, bias=False))
    work = measure(model, NextToken(), 32, 1024, torch.bfloat16, gathered=False)
    compiled = work.compiled(chunks=1)
    logits, tokens = 2 * 32 * 1024 * 50304, 32 * 1024
    assert compiled.rest.saved_activations == compiled.transient == work.logits == logits
    per_token = (compiled.block.saved_activations - 2 * 12 * 768**2) / tokens
    residual, products, attention = 4 * 768, 2 * (3 + 1 + 4 + 1) * 768, 2 * 768 + 4 * 12
    assert per_token == residual + products + attention < work.block.saved_activations / tokens
    assert 12.5 < (12 * compiled.block.saved_activations + 2 * logits) / 2**30 < 14
    chunked, head = work.compiled(chunks=4), 50304 * 768
    assert chunked.transient == 2 * logits / 4 + 2 * (4 + 2) * head
    assert compiled.rest.backward.bytes < work.rest.backward.bytes
