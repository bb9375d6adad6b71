"""In chunks, the loss and every gradient are those of the whole, and the logits are never all there."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cleangpt.config import LoRAConfig, TrainingConfig
from cleangpt.data.batch import IGNORED
from cleangpt.distributed.layout import Layout, check_loss_chunk
from cleangpt.errors import UserError
from cleangpt.models import MODELS, build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.lora import add_adapter
from cleangpt.objectives import OBJECTIVES, Objective, choose_objective
from cleangpt.objectives.next_token import next_token, next_token_z

SIZE: dict[str, Any] = {"vocab_size": 97, "max_seq_len": 16, "n_layers": 2, "n_heads": 2, "dim": 16}
CONFIGS = {
    "gpt": GPTConfig(**SIZE),
    "llama": LlamaConfig(**SIZE, hidden_dim=24),
    "tied": LlamaConfig(**SIZE, hidden_dim=24, tied=True, logit_soft_cap=5.0),
}


def batch() -> tuple[Tensor, Tensor]:
    """Three samples, of which some targets do not count, among them all of the last."""
    tokens = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = IGNORED
    targets[2] = IGNORED
    return tokens[:, :-1], targets


def gradients(model: nn.Module, objective: Objective) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss, and the gradients of a seventh of it."""
    model.zero_grad()
    loss = objective(model, *batch())
    (loss / 7).backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(model: nn.Module, objective: Any, chunk: int) -> None:
    loss, expected = gradients(model, objective)
    ours, found = gradients(model, partial(objective, chunk=chunk))
    torch.testing.assert_close(ours, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("objective", [next_token, next_token_z])
@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_loss_and_gradients_are_those_of_the_whole(kind: str, objective: Objective, chunk: int) -> None:
    torch.manual_seed(0)
    assert_same(build_model(CONFIGS[kind]), objective, chunk)


@pytest.mark.parametrize("trains", ["head.*", "blocks.*", "adapters"])
def test_what_is_frozen_gets_no_gradient(trains: str) -> None:
    torch.manual_seed(0)
    model = build_model(CONFIGS["llama"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trains.removesuffix("*")))
    if trains == "adapters":
        head = model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        add_adapter(head, LoRAConfig(rank=2))
        nn.init.normal_(head.get_parameter("lora.b"))
    assert_same(model, next_token, 7)


@torch.no_grad()
def test_without_gradients_the_loss_is_the_same() -> None:
    for kind, config in CONFIGS.items():
        model = build_model(config)
        torch.testing.assert_close(next_token(model, *batch(), chunk=5), next_token(model, *batch()), msg=kind)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made while it is on."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


@pytest.mark.parametrize(("chunk", "most"), [(None, 48 * 5000), (8, 16 * 5000), (48, 48 * 5000)])
def test_no_tensor_is_larger_than_the_head_or_a_chunk_of_logits(chunk: int | None, most: int) -> None:
    model = build_model(replace(CONFIGS["gpt"], vocab_size=5000))
    with Largest() as largest:
        next_token(model, *batch(), chunk=chunk).backward()
    assert largest.numbers == most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_near_those_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build_model(CONFIGS["gpt"])
    _, expected = gradients(model, next_token)
    with torch.autocast("cpu", dtype):
        _, found = gradients(model, partial(next_token, chunk=7))
    for name, gradient in expected.items():
        assert gradient is not None and found[name] is not None
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-6, name


def whole_only(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return next_token(model, inputs, targets)


class NoReduce(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class NoReduceConfig(GPTConfig):
    pass


def test_what_cannot_be_cut_into_chunks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "whole_only", whole_only)
    monkeypatch.setitem(MODELS, "no_reduce", (NoReduceConfig, NoReduce))
    with pytest.raises(UserError, match=r"loss_chunk is 4; allowed with objective whole_only: None"):
        choose_objective("whole_only", 4)
    assert choose_objective("whole_only") is whole_only
    with pytest.raises(UserError, match=r"'next_tokn'; allowed: next_token, .*; did you mean 'next_token'"):
        choose_objective("next_tokn")
    training = TrainingConfig(macro_batches=1, batches_per_macro_batch=1, loss_chunk=4)
    check_loss_chunk(training, CONFIGS["gpt"], Layout(2, 2))
    check_loss_chunk(replace(training, loss_chunk=None, compile="model"), NoReduceConfig(**SIZE), Layout(tensor=2))
    for changed, config, place, message in (
        (training, CONFIGS["gpt"], Layout(tensor=2), "with tensor parallelism: None"),
        (replace(training, compile="model"), CONFIGS["gpt"], Layout(), "with training.compile model: None"),
        (training, NoReduceConfig(**SIZE), Layout(), "with NoReduce: None"),
    ):
        with pytest.raises(UserError, match=rf"training\.loss_chunk is 4; allowed {message}"):
            check_loss_chunk(changed, config, place)
