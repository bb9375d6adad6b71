"""What matrices are multiplied in, and what is compiled."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cleangpt.distributed.device import (
    can_compile,
    check_precision,
    choose_device,
    compile_blocks,
    compute_dtype,
    set_fp32_precision,
    uncompiled,
    use_fp8,
)
from cleangpt.errors import UserError
from cleangpt.models.gpt import GPT, GPTConfig
from tests.losses import next_token

CPU = torch.device("cpu")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", rank) for rank in (0, 1)] == [torch.device("cuda"), torch.device("cuda:1")]
    with pytest.raises(UserError, match="this machine has 2 cuda devices, and a process needs its own; start 2 pro"):
        choose_device("cuda", 2)
    assert choose_device("cpu", 7) == CPU
    with pytest.raises(UserError, match=r"training\.device is 'cuda:2', but this machine has 2 cuda devices"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:07", "cuda:200", "meta", ""])
def test_a_device_that_there_cannot_be_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device is '{name}'; allowed: auto, cpu, cuda, cuda:N or mps$"):
        choose_device(name)


@pytest.mark.slow
def test_a_run_on_one_device_loads_neither_the_compiler_nor_what_cuts_tensors(workplace: Path) -> None:
    """Each takes as long to load as half of PyTorch or all of it, and a run on one device needs neither."""
    script = """
import sys
from cleangpt.commands import main

main(["train", "adder", "--training.macro-batches", "1", "--training.batches-per-macro-batch", "1",
      "--corpus.train-samples", "64", "--corpus.val-samples", "16", "--corpus.test-samples", "8",
      "--optimizer.muon.lr", "0.01", "--training.device", "cpu", "--tracking.sample-tokens", "5"])
heavy = {"torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "sympy"}
print("loaded:", sorted(heavy & sys.modules.keys()))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "loaded: []" in output, output


@pytest.fixture
def exact() -> Iterator[None]:
    """Leaves PyTorch's settings as they were found."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "setting"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32"), ("auto", "tf32")]
)
def test_fp32_matrices_are_multiplied_exactly_only_with_fp32(exact: None, precision: str, setting: str) -> None:
    other = "tf32" if setting == "ieee" else "ieee"
    for settings in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        settings.fp32_precision = other  # as some library might have
    set_fp32_precision(precision)
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == setting
    # PyTorch's compiler reads the older settings as well, and that raises where they differ from the newer ones.
    assert torch.backends.cuda.matmul.allow_tf32 == (setting == "tf32")
    assert torch.get_float32_matmul_precision() == ("high" if setting == "tf32" else "highest")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp8", torch.bfloat16),
        ("fp16", torch.float16),
    ],
)
def test_each_precision_computes_in_its_own_type_on_a_cpu(precision: str, dtype: torch.dtype) -> None:
    assert compute_dtype(CPU, precision) == dtype


def loss_and_gradients(model: GPT) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = next_token(model, tokens, tokens.roll(-1, 1)) / tokens.numel()
    loss.backward()
    return loss.item(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def make_model(**fields: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab_size": 32, "max_seq_len": 16, "n_layers": 2, "n_heads": 2, "dim": 32, **fields}))


def test_fp8_keeps_names_and_weights_and_learns_nearly_the_same() -> None:
    """Emulated: the products are those of fp8 numbers, computed in another type."""
    pytest.importorskip("torchao")
    plain, cut = make_model(), make_model()
    use_fp8(cut, emulate=True)
    assert type(cut.blocks[0].mlp.up).__name__ == "Float8Linear"
    assert {name: weight.dtype for name, weight in cut.state_dict().items()} == dict.fromkeys(
        plain.state_dict(), torch.float32
    )
    (loss, gradients), (loss8, gradients8) = loss_and_gradients(plain), loss_and_gradients(cut)
    assert loss8 != loss and loss8 == pytest.approx(loss, rel=0.01)
    for name in gradients:
        similarity = torch.cosine_similarity(gradients[name].flatten(), gradients8[name].flatten(), dim=0)
        assert similarity > 0.97, name


def test_layers_that_fp8_units_cannot_take_stay_as_they_are() -> None:
    pytest.importorskip("torchao")
    model = make_model(dim=24, n_heads=2)
    use_fp8(model, emulate=True)
    assert type(model.blocks[0].mlp.up) is torch.nn.Linear


def test_fp8_without_its_units_is_refused_in_one_line() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match=r"training\.precision is 'fp8', but cpu .* has no fp8 units; allowed: GPUs"):
        check_precision("fp8", CPU)


def test_a_machine_without_a_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not can_compile(CPU)


@pytest.mark.slow
def test_compiled_blocks_share_one_compilation_and_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """And step aside for inputs of changing shape."""
    counter = CompileCounterWithBackend("inductor")
    plain, model = make_model(n_layers=4), make_model(n_layers=4)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compile_blocks(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.randint(0, 32, (2, 16))
    torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1
    with uncompiled("blocks"):
        for length in range(1, 16):
            torch.testing.assert_close(model(tokens[:, :length]), plain(tokens[:, :length]))
    assert counter.frame_count == 1
