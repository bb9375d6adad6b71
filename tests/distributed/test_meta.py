"""A model is given its first values part by part, and they do not depend on who does it."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from cleangpt.config import LoRAConfig
from cleangpt.distributed.layout import Layout
from cleangpt.distributed.parallelize import parallelize
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.lora import add_adapter, is_adapter

CPU = torch.device("cpu")
SMALL = GPTConfig(vocab_size=32, max_seq_len=16, n_layers=2, n_heads=2, dim=16)


def built(build: "type[GPT]" = GPT) -> nn.Module:
    torch.manual_seed(7)
    return parallelize(lambda: build(SMALL), Layout(), CPU)


def test_a_model_from_the_meta_device_has_every_parameter_drawn_in_order() -> None:
    model = built()
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape)
        model.init_parameter(name, drawn)
        torch.testing.assert_close(parameter, drawn, rtol=0, atol=0)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_adapters_added_before_the_model_is_cut_are_drawn_once_and_in_order() -> None:
    torch.manual_seed(7)
    adapted = LoRAConfig(rank=2)
    model = parallelize(
        lambda: GPT(SMALL), Layout(), CPU, lambda plain: add_adapter(plain.get_submodule("blocks.1.mlp.up"), adapted)
    )
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape)
        if is_adapter(name):
            model.get_submodule("blocks.1.mlp.up.lora").init_parameter(name.rpartition(".")[2], drawn)
        else:
            model.init_parameter(name, drawn)
        torch.testing.assert_close(parameter, drawn, rtol=0, atol=0)


class Scaled(GPT):
    """Somebody's change of GPT, whose `__init__` sets a value that GPT's `init_parameter` knows nothing of."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((), 3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale


def test_values_that_a_derived_class_sets_itself_are_kept() -> None:
    model = built(Scaled)
    assert model.scale.item() == 3.0 and model.blocks[0].mlp.up.weight.std() < 0.03


LARGE = """
import resource
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from cleangpt.config import ParallelConfig
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.distributed.layout import layout_for
from cleangpt.distributed.parallelize import parallelize

dist.init_process_group("fake", store=FakeStore(), rank=5, world_size={world_size})
config = LlamaConfig(vocab_size=4096, max_seq_len=128, n_layers=32, n_heads=16, dim=1024, hidden_dim=2816)
place = layout_for(ParallelConfig(strategy="fsdp", tensor={tensor}), {world_size})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = parallelize(lambda: Llama(config), place, torch.device("cpu"))
whole = 4 * sum(parameter.numel() for parameter in model.parameters())
here = 4 * sum(parameter.to_local().numel() for parameter in model.parameters())
print(whole, here, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize(("world_size", "tensor"), [(64, 1), (64, 8)])
def test_a_process_never_holds_the_whole_model(world_size: int, tensor: int) -> None:
    """One of 64 pretended processes makes its part of 1.7 GB of weights, and needs a tenth of that on the way."""
    code = LARGE.format(world_size=world_size, tensor=tensor)
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    whole, here, peak = map(int, outcome.stdout.split())
    assert whole > 1.5e9 and here < whole / 50
    assert peak < whole / 10
