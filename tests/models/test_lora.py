"""Low-rank adapters: nothing at first, then B A besides the weight, and one matrix again in a checkpoint."""

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cleangpt.checkpoints.checkpoint import best_checkpoint, load_checkpoint, load_matching_weights
from cleangpt.commands import main
from cleangpt.config import FineTuningConfig, LoRAConfig, ModelConfig
from cleangpt.distributed.device import use_fp8
from cleangpt.distributed.layout import Layout
from cleangpt.distributed.parallelize import parallelize
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.files import sha256
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models import build_model
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.lora import is_adapter, linear_layers, merge, split_adapters
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.finetuning import freeze_and_add_lora
from cleangpt.training.trainer import Trainer

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]
CPU = torch.device("cpu")
SIZES = {"vocab_size": 32, "max_seq_len": 16, "n_layers": 2, "n_heads": 2, "dim": 16}
GPT_SMALL = GPTConfig(**SIZES)  # type: ignore[arg-type]
LLAMA_SMALL = LlamaConfig(**SIZES, hidden_dim=24)  # type: ignore[arg-type]
EXPERTS = replace(LLAMA_SMALL, n_experts=4, n_shared_experts=1, bias_update_rate=0.01)
TOKENS = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))


def adapted(config: ModelConfig, **fields: object) -> nn.Module:
    """A model with adapters, all of whose numbers are far from zero."""
    torch.manual_seed(0)
    model = build_model(config)
    freeze_and_add_lora(model, FineTuningConfig(lora=LoRAConfig(**{"rank": 3, "alpha": 6.0} | fields)))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if is_adapter(name) else 0.1)
    return model.eval()


@pytest.mark.parametrize("config", [GPT_SMALL, LLAMA_SMALL, EXPERTS], ids=["gpt", "llama", "experts"])
def test_new_adapters_change_nothing(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config)
    before = model(TOKENS)
    freeze_and_add_lora(model, FineTuningConfig(lora=LoRAConfig(rank=4)))
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("config", [GPT_SMALL, LLAMA_SMALL, EXPERTS], ids=["gpt", "llama", "experts"])
def test_merged_weights_are_the_base_and_the_scaled_product_and_compute_the_same(config: ModelConfig) -> None:
    model = adapted(config)
    base, adapters = split_adapters(model.state_dict())
    merged = merge(base, adapters, scale=6.0 / 3)
    plain = build_model(config).eval()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-4)
    layers = {name.removesuffix(".lora.a") for name in adapters if name.endswith(".a")}
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            a, b = adapters[f"{layer}.lora.a"], adapters[f"{layer}.lora.b"]
            weight = weight + 2 * torch.einsum("or,ri->oi", b, a)
        torch.testing.assert_close(merged[name], weight)


def test_the_gradients_are_those_of_the_merged_weight_by_the_chain_rule() -> None:
    """With W + s B A as the weight: dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ."""
    model = adapted(GPT_SMALL)
    plain = build_model(GPT_SMALL).eval()
    plain.load_state_dict(merge(*split_adapters(model.state_dict()), scale=2.0))
    for one in (model, plain):
        one(TOKENS).square().mean().backward()
    whole = plain.get_submodule("blocks.1.mlp.up").weight.grad
    adapter = model.get_submodule("blocks.1.mlp.up.lora")
    torch.testing.assert_close(adapter.a.grad, 2 * adapter.b.detach().T @ whole, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(adapter.b.grad, 2 * whole @ adapter.a.detach().T, atol=1e-6, rtol=1e-3)


def test_every_linear_layer_of_the_blocks_has_an_adapter_but_routers_and_stacked_experts() -> None:
    def layers(model: nn.Module) -> set[str]:
        return {name.removesuffix(".lora.a") for name, _ in model.named_parameters() if name.endswith(".lora.a")}

    assert {name.removeprefix("blocks.0.") for name in layers(adapted(GPT_SMALL)) if name.startswith("blocks.0")} == {
        "attention.qkv", "attention.out", "mlp.up", "mlp.down",
    }  # fmt: skip
    attention = {"attention.query", "attention.key", "attention.value", "attention.out"}
    for config, mlp in ((LLAMA_SMALL, "mlp."), (EXPERTS, "mlp.shared.")):
        found = {name.removeprefix("blocks.1.") for name in layers(adapted(config)) if name.startswith("blocks.1")}
        assert found == attention | {mlp + part for part in ("gate", "up", "down")}
    assert "head" in linear_layers(build_model(LLAMA_SMALL)) and "head" not in layers(adapted(LLAMA_SMALL))
    chosen = adapted(LLAMA_SMALL, targets=("blocks.*.attention.query", "head"))
    assert layers(chosen) == {"blocks.0.attention.query", "blocks.1.attention.query", "head"}


def test_adapters_from_the_meta_device_are_initialized() -> None:
    tuning = FineTuningConfig(lora=LoRAConfig(rank=4))
    torch.manual_seed(0)
    model = parallelize(lambda: GPT(GPT_SMALL), Layout(), CPU, lambda plain: freeze_and_add_lora(plain, tuning))
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta
        if name.endswith("lora.a"):
            bound = 1 / parameter.shape[1] ** 0.5
            assert 0.8 * bound < parameter.abs().max() <= bound and parameter.unique().numel() == parameter.numel()
        if name.endswith("lora.b"):
            assert not parameter.any()
        assert parameter.requires_grad == is_adapter(name)


class Shifted(GPT):
    """Somebody's change of GPT, which is built whole, since its `__init__` sets a value of its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.shift = nn.Parameter(torch.ones(()))


def test_adapters_of_an_unsharded_model_are_initialized() -> None:
    tuning = FineTuningConfig(lora=LoRAConfig(rank=4))
    model = parallelize(lambda: Shifted(GPT_SMALL), Layout(), CPU, lambda plain: freeze_and_add_lora(plain, tuning))
    adapter = model.get_submodule("blocks.1.mlp.down.lora")
    assert adapter.a.unique().numel() == adapter.a.numel() and not adapter.b.any() and model.shift.item() == 1


def test_adapters_stand_beside_layers_that_multiply_in_fp8() -> None:
    """Emulated: within the rounding of fp8 of the same model in fp32."""
    pytest.importorskip("torchao")
    model, plain = build_model(GPT_SMALL), adapted(GPT_SMALL)
    use_fp8(model, emulate=True)
    freeze_and_add_lora(model, FineTuningConfig(lora=LoRAConfig(rank=3, alpha=6.0)))
    model.load_state_dict(plain.state_dict())
    ours, theirs = model.eval()(TOKENS), plain(TOKENS)
    assert 0 < (ours - theirs).abs().max() < 0.1 * theirs.abs().max()
    ours.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in model.named_parameters() if is_adapter(name)
    }


def test_dropout_applies_to_an_adapters_inputs_in_training_only() -> None:
    model = adapted(GPT_SMALL, dropout=0.5)
    assert torch.equal(model(TOKENS), model(TOKENS))
    torch.testing.assert_close(model(TOKENS), adapted(GPT_SMALL)(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    adapter, x = model.get_submodule("blocks.0.mlp.up.lora"), torch.ones(20_000, 16)
    torch.testing.assert_close(adapter(x).mean(0), 2 * adapter.b @ adapter.a @ x[0], atol=0.1, rtol=0.1)


def test_adapters_are_not_expected_in_a_checkpoint() -> None:
    model, other = adapted(GPT_SMALL), build_model(GPT_SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if is_adapter(name)}
    assert load_matching_weights(model, other.state_dict()) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if is_adapter(name) else other.state_dict()[name])


# In a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny: Build, trainer: Open) -> Path:
    """A run to start from."""
    trainer(tiny(run_dir="base", training__macro_batches=2)).train()
    return Path("base")


def lora(**fields: object) -> dict[str, object]:
    return {"init_from": "base", "fine_tuning": FineTuningConfig(lora=LoRAConfig(**{"rank": 2} | fields))}  # type: ignore[arg-type]


def logits(folder: Path) -> Tensor:
    return load_checkpoint(folder).model(CPU)(TOKENS[:, :8] % 13)


def test_the_base_stays_bit_for_bit_and_the_checkpoint_is_a_plain_one(base: Path, tiny: Build, trainer: Open) -> None:
    tuned = trainer(tiny(run_dir="tuned", **lora(dropout=0.1)))
    assert tuned.optimizer.names and all(map(is_adapter, tuned.optimizer.names))
    assert tuned.train() == "finished"
    began = load_file(best_checkpoint(base) / "model.safetensors")
    weights, adapters = split_adapters(tuned.model.state_dict())
    assert weights.keys() == began.keys() and all(torch.equal(weights[name], began[name]) for name in began)
    assert all(tensor.any() for tensor in adapters.values())
    folder = best_checkpoint(Path("tuned"))
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == began.keys()
    with safe_open(folder / "adapters.safetensors", framework="pt") as file:
        rank, alpha = json.loads(file.metadata()["lora"]).values()
        a, b = (file.get_tensor(f"blocks.0.mlp.up.lora.{part}") for part in "ab")
    assert (rank, alpha) == (2, 16.0)
    torch.testing.assert_close(
        merged["blocks.0.mlp.up.weight"], began["blocks.0.mlp.up.weight"] + alpha / rank * b @ a, atol=1e-6, rtol=1e-5
    )


def test_the_first_validation_is_that_of_the_base(base: Path, tiny: Build, trainer: Open) -> None:
    tuned = trainer(tiny(run_dir="tuned", **lora()))
    assert tuned.validate() == pytest.approx(read_metrics(base)[-1]["val_loss"], rel=1e-6)
    tuned.source.close()


@pytest.mark.slow
def test_equal_runs_write_equal_bytes_that_are_as_readable_as_other_files(
    base: Path, tiny: Build, trainer: Open
) -> None:
    """Weights, adapters, snapshots and an export, whatever the umask; several entries of metadata would be shuffled."""
    digests, modes = [], set()
    for run, mask in (("one", 0o022), ("two", 0o027)):
        before = os.umask(mask)
        try:
            trainer(tiny(run_dir=run, **lora())).train()
            export(open_checkpoint(run), "hf", Path(f"{run}-hf"))
        finally:
            os.umask(before)
        files = [path for folder in (run, f"{run}-hf") for path in Path(folder).rglob("*") if path.is_file()]
        modes |= {(mask, stat.S_IMODE(path.stat().st_mode)) for path in files if path.name != "lock"}
        tensors = sorted(path for path in files if path.suffix == ".safetensors")
        digests.append([(path.name, sha256(path)) for path in tensors])
    assert {name for name, _ in digests[0]} == {"model.safetensors", "adapters.safetensors", "shard_00000.safetensors"}
    assert digests[0] == digests[1]
    assert sys.platform == "win32" or modes == {(0o022, 0o644), (0o027, 0o640)}


def test_the_checkpoints_loss_is_that_of_the_model_in_training_and_another_run_starts_from_it(
    base: Path, tiny: Build, trainer: Open
) -> None:
    trainer(tiny(run_dir="tuned", **lora())).train()
    best = min(line["val_loss"] for line in read_metrics(Path("tuned")))
    again = trainer(tiny(run_dir="again", **lora() | {"init_from": "tuned"}))
    assert again.validate() == pytest.approx(best, rel=1e-5)
    assert "is in the checkpoint but not" not in Path("again/log.txt").read_text()
    again.source.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"training__recompute_every": 1}, marks=pytest.mark.slow),
        pytest.param({"training__precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param({"training__compile": "model"}, marks=pytest.mark.torture),
        pytest.param({"training__compile": "blocks", "training__recompute_every": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: " ".join(map(str, fields.values())) or "plain",
)
def test_a_run_with_adapters_resumes_bit_for_bit(
    base: Path, tiny: Build, trainer: Open, fields: dict[str, object]
) -> None:
    whole = trainer(tiny(run_dir="whole", **lora(dropout=0.2), **fields))
    whole.train()
    first = trainer(tiny(run_dir="parts", **lora(dropout=0.2), **fields))
    step = first.step

    def then() -> None:
        step()
        first.stopping.signals.requested = "SIGTERM" if first.position.step == 9 else None

    first.step = then  # type: ignore[method-assign]
    assert first.train() == "interrupted"
    second = trainer(tiny(run_dir="parts", **lora(dropout=0.2), **fields))
    assert second.position.step == 9
    second.train()
    one, two = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["model", pytest.param("blocks", marks=pytest.mark.torture)])
def test_a_compiled_model_with_adapters_learns_the_same(base: Path, tiny: Build, trainer: Open, compiled: str) -> None:
    fields = lora() | {"model__dropout": 0.0}
    trainer(tiny(run_dir="plain", **fields)).train()
    trainer(tiny(run_dir="compiled", **fields, training__compile=compiled)).train()
    for one, two in zip(read_metrics(Path("plain")), read_metrics(Path("compiled")), strict=True):
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_run_with_adapters_is_sampled_evaluated_and_exported_like_any_other(
    base: Path, tiny: Build, trainer: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    trainer(tiny(run_dir="tuned", **lora())).train()
    assert main(["sample", "tuned", "--prompt", "12+34=", "--device", "cpu"]) == 0
    assert main(["evaluate", "tuned", "--split", "val", "--device", "cpu", "--json"]) == 0
    assert main(["export", "tuned", "--out", "exported"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    tuned = logits(best_checkpoint(Path("tuned")))
    torch.testing.assert_close(theirs(TOKENS[:, :8] % 13).logits, tuned, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tuned, logits(best_checkpoint(base)), atol=1e-2)


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (GPT_SMALL, ("block.*",), r"'block\.\*' matches no linear layer; did you mean 'blocks\.\*'"),
        (GPT_SMALL, ("blocks.*.attention.query",), "matches no linear layer; did you mean 'blocks.1.attention."),
        (EXPERTS, ("blocks.*.mlp.up",), "'blocks.*.mlp.up' matches no linear layer"),
        (EXPERTS, ("blocks.*.mlp.router",), "'blocks.*.mlp.router' matches no linear layer"),
    ],
)
def test_a_target_that_is_not_a_linear_layer_is_refused(
    config: ModelConfig, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=r"^fine_tuning\.lora\.targets: .*" + message.replace("*.", r"\*.")) as refused:
        adapted(config, targets=targets)
    assert "\n" not in str(refused.value)
