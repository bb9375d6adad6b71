"""Under muP, what an update changes in a model does not depend on its width; without, it grows with it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import FineTuningConfig, LoRAConfig, ModelConfig, MuonConfig, OptimizerConfig
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models import MODELS, build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.training.launch import check
from cleangpt.training.mup import MuPScale, mup_scales, scale_init
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.resolve import resolve
from cleangpt.training.trainer import Trainer

SMALL: dict[str, Any] = {"vocab_size": 50, "max_seq_len": 32, "n_layers": 2}
WIDTHS = (32, 64, 128, 256)
TOKENS = torch.randint(50, (8, 33), generator=torch.Generator().manual_seed(1))
LAYERS = [f"blocks.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]


def gpt(dim: int) -> ModelConfig:
    return GPTConfig(**SMALL, dim=dim, n_heads=dim // 16)


def llama(dim: int, **fields: Any) -> ModelConfig:
    return LlamaConfig(**SMALL, dim=dim, n_heads=dim // 16, hidden_dim=2 * dim, **fields)


MODELS_BY_WIDTH: dict[str, Callable[[int], ModelConfig]] = {
    "gpt": gpt, "llama": llama, "tied": partial(llama, tied=True), "experts": partial(llama, n_experts=4),
}  # fmt: skip


def rates(muon: bool, base_dim: int | None) -> OptimizerConfig:
    return OptimizerConfig(lr=0.01, muon=MuonConfig(lr=0.01 if muon else None), base_dim=base_dim)


def prepared(config: ModelConfig, optimizer: OptimizerConfig) -> tuple[nn.Module, Optimizer]:
    """A model with the initial weights of its width, and its optimizer."""
    torch.manual_seed(0)
    model, factors = build_model(config), mup_scales(config, optimizer)
    scale_init(model, factors)
    return model, Optimizer(model, optimizer, mup_scales={name: factor.lr for name, factor in factors.items()})


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        loss = F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.backward(loss)
        optimizer.step(0.01, 0.1)


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """What the layers, and with the name "" the model, give for the tokens."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).detach()

    hooks = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in (*LAYERS, "")]
    model(TOKENS[:, :-1])
    for hook in hooks:
        hook.remove()
    return found


def changes(config: ModelConfig, optimizer_config: OptimizerConfig) -> dict[str, float]:
    """The root mean square of what three steps change in each output."""
    model, optimizer = prepared(config, optimizer_config)
    before = outputs(model)
    train(model, optimizer)
    after = outputs(model)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@pytest.mark.default(1)
@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adamw", "muon"])
@pytest.mark.parametrize("kind", MODELS_BY_WIDTH)
def test_updates_change_activations_alike_at_all_widths_with_mup_and_more_at_larger_ones_without(
    kind: str, muon: bool
) -> None:
    """The coordinate check of Yang et al. 2022, section D.1."""
    with_mup = [changes(MODELS_BY_WIDTH[kind](dim), rates(muon, 32)) for dim in WIDTHS]
    without = [changes(MODELS_BY_WIDTH[kind](dim), rates(muon, None)) for dim in WIDTHS]
    for name in with_mup[0]:
        sizes = [each[name] for each in with_mup]
        assert max(sizes) < 2.2 * min(sizes), name
        assert without[-1][name] > (4 if name else 3) * without[0][name], name


# The factors ---------------------------------------------------------------------------------------------------------


def test_the_factors_are_those_of_the_table() -> None:
    r = 4
    config = llama(128, n_experts=4, qkv_bias=True, ngrams=(2,), ngram_rows=7)
    factors = mup_scales(config, rates(False, 32))
    fixed, hidden, out = MuPScale(), MuPScale(1 / math.sqrt(r), 1 / r), MuPScale(1 / r, 1 / r)
    expected = {
        "token_embedding.weight": fixed, "ngram_embeddings.0.weight": fixed, "blocks.0.attention_norm.weight": fixed,
        "blocks.0.attention.query.bias": fixed, "blocks.0.attention.query.weight": hidden,
        "blocks.1.attention.out.weight": hidden, "blocks.0.mlp.up": hidden, "blocks.0.mlp.down": hidden,
        "blocks.0.mlp.router.weight": out, "final_norm.weight": fixed, "head.weight": out,
    }  # fmt: skip
    assert {name: factors[name] for name in expected} == expected
    with_muon = mup_scales(config, rates(True, 32))
    assert with_muon["blocks.0.mlp.up"].lr == 1 / math.sqrt(r) and with_muon["blocks.0.mlp.router.weight"].lr == 1 / r
    assert with_muon["head.weight"] == out


def test_the_heads_of_a_fused_matrix_count_each_for_itself() -> None:
    factors = mup_scales(gpt(128), rates(True, 32))
    assert factors["blocks.0.attention.qkv.weight"] == MuPScale(1 / 2, 1 / 4)
    assert factors["blocks.0.attention.out.weight"] == MuPScale(1 / 2, 1 / 2)


@pytest.mark.parametrize(("tied", "factor"), [(False, 1 / 4), (True, 1.0)])
def test_a_scalar_head_learns_as_the_head_unless_the_norm_before_it_does(tied: bool, factor: float) -> None:
    config = llama(128, tied=tied)
    plain, with_value = (mup_scales(config, rates(False, 32), heads) for heads in ((), {"value"}))
    assert with_value.pop("heads.value.weight").lr == factor
    assert with_value == plain and with_value["final_norm.weight"].lr == (1 / 4 if tied else 1.0)


@pytest.mark.parametrize("kind", MODELS_BY_WIDTH)
@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_at_the_base_width_nothing_changes(kind: str, muon: bool) -> None:
    factors = mup_scales(MODELS_BY_WIDTH[kind](64), rates(muon, 64))
    assert set(factors.values()) == {MuPScale()}
    assert mup_scales(MODELS_BY_WIDTH[kind](64), rates(muon, None)) == {}


def test_the_last_norm_stands_for_a_multiplier_of_a_tied_heads_logits() -> None:
    """Table 8 of the paper: logits times base width / width, and the gain as it was."""

    class Multiplied(GPT):
        def forward(self, *arguments: Any) -> Tensor:
            return super().forward(*arguments) / 4

    optimizer = OptimizerConfig(lr=0.01, clip_norm=None, eps=1e-20, base_dim=32)
    ours, our_optimizer = prepared(gpt(128), optimizer)
    factors = mup_scales(gpt(128), optimizer)
    theirs = Multiplied(ours.config)
    theirs.load_state_dict(ours.state_dict())
    nn.init.ones_(theirs.final_norm.weight)
    rates_there = {name: 1.0 if name.startswith("final_norm") else factor.lr for name, factor in factors.items()}
    their_optimizer = Optimizer(theirs, optimizer, mup_scales=rates_there)
    for model, each in ((ours, our_optimizer), (theirs, their_optimizer)):
        train(model, each)
    torch.testing.assert_close(outputs(ours)[""], outputs(theirs)[""], atol=1e-4, rtol=1e-3)


def test_a_step_decays_the_same_share_of_a_matrix_at_any_width() -> None:
    model = LanguageModel(ModelConfig(max_seq_len=8))
    model.linear = nn.Linear(4, 4)
    optimizer = Optimizer(model, OptimizerConfig(lr=0.1), mup_scales={"linear.weight": 1 / 8})
    before = model.linear.weight.detach().clone()
    model.linear.weight.grad, model.linear.bias.grad = torch.zeros(4, 4), torch.zeros(4)
    optimizer.step(0.1, 0.5)
    torch.testing.assert_close(model.linear.weight.detach(), before * (1 - 0.1 * 0.5))


def test_a_run_begins_and_moves_by_the_factors(
    tiny: Callable[..., Experiment], trainer: Callable[..., Trainer]
) -> None:
    experiment = resolve(tiny(run_dir="other", optimizer__base_dim=8), 13)
    plain, other = trainer(tiny(run_dir="plain")), trainer(experiment)
    factors = mup_scales(experiment.model, experiment.optimizer)
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(other.model.get_parameter(name), weight * factors[name].initial)
    assert {group["factor"] for group in other.optimizer.adamw.param_groups} == {1.0, 0.5}


# What does not fit ---------------------------------------------------------------------------------------------------


def test_a_model_at_another_width_has_heads_of_the_same_size() -> None:
    config = LlamaConfig(**SMALL, dim=128, n_heads=8, n_kv_heads=4, hidden_dim=344)
    narrow = config.at_width(64)
    assert (narrow.dim, narrow.n_heads, narrow.n_kv_heads, narrow.hidden_dim) == (64, 4, 2, 172)
    assert narrow.head_size == config.head_size
    assert narrow.at_width(128) == config


@pytest.mark.parametrize("dim", [0, 16, 48, 100])
def test_a_width_at_which_something_would_not_be_whole_is_refused(dim: int) -> None:
    config = LlamaConfig(**SMALL, dim=128, n_heads=8, n_kv_heads=4, hidden_dim=344)
    with pytest.raises(UserError, match=f"a width of {dim} .*multiples of 32$"):
        config.at_width(dim)


def test_adapters_are_refused(tiny: Callable[..., Experiment]) -> None:
    tuning = FineTuningConfig(lora=LoRAConfig(rank=2))
    with pytest.raises(UserError, match=r"optimizer\.base_dim"):
        check(tiny(optimizer__base_dim=8, init_from="runs/other", fine_tuning=tuning))


def test_a_model_with_convolutions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Convolutional(nn.Module):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(config.dim, config.dim, 3)

    monkeypatch.setitem(MODELS, "gpt", (GPTConfig, Convolutional))
    with pytest.raises(UserError, match="convolutions"):
        mup_scales(gpt(64), rates(False, 32))


def test_a_model_without_head_and_final_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Headless(LanguageModel):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            self.token_embedding = nn.Embedding(50, config.dim)

    monkeypatch.setitem(MODELS, "gpt", (GPTConfig, Headless))
    with pytest.raises(UserError, match="final_norm"):
        mup_scales(gpt(64), rates(False, 32))
