"""What is frozen stays bit for bit, layers have rates of their own, moments are taken over or not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cleangpt.checkpoints.run_folder import check_resumable, read_experiment
from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.commands import main
from cleangpt.config import FineTuningConfig, LoRAConfig, ModelConfig, MuonConfig, OptimizerConfig, ParallelConfig
from cleangpt.corpora import prepare
from cleangpt.distributed.layout import Layout, state_bytes
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models import MODELS, build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.blocks import hidden_matrices
from cleangpt.models.flops import flops_per_token
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.balancing import ExpertLoadBalancer
from cleangpt.training.finetuning import (
    check_parameters,
    freeze_and_add_lora,
    frozen_names,
    layer_factors,
    lr_factors,
    matching,
)
from cleangpt.training.launch import check
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.summary import summary
from cleangpt.training.trainer import Trainer
from tests.forked import run_together
from tests.losses import next_token


def check_tuning(experiment: Experiment, layout: Layout) -> None:
    check_parameters(experiment.fine_tuning, experiment.model, experiment.optimizer, layout)


Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]
GPT_SMALL = GPTConfig(vocab_size=32, max_seq_len=16, n_layers=3, n_heads=2, dim=16)
FROZEN = ("token_embedding.*", "position_embedding.*", "blocks.0.*")
TOKENS = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0))


def freeze(*patterns: str) -> FineTuningConfig:
    return FineTuningConfig(freeze=patterns)


# Frozen --------------------------------------------------------------------------------------------------------------


@pytest.mark.default(1)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"training__recompute_every": 1},
        {"training__precision": "fp16"},
        pytest.param({"training__compile": "model"}, marks=pytest.mark.slow),
        pytest.param({"training__compile": "blocks"}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: " ".join(map(str, fields.values())) or "plain",
)
def test_frozen_parameters_stay_bit_for_bit_without_gradient_moments_and_decay(
    tiny: Build, trainer: Open, fields: dict[str, Any]
) -> None:
    tuned = trainer(tiny(run_dir="run", fine_tuning=freeze(*FROZEN), optimizer__weight_decay=0.5, **fields))
    before = {name: parameter.detach().clone() for name, parameter in tuned.model.named_parameters()}
    tuned.train()
    frozen = {name for name in before if name.startswith(("token_", "position_", "blocks.0."))}
    for name, parameter in tuned.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
        assert parameter.grad is None
    moments = load_snapshot(list_snapshots(Path("run/snapshots"))[0])["optimizer"]["moments"]
    assert moments.keys() == before.keys() - frozen


def test_what_trains_learns_as_if_the_frozen_gradient_were_thrown_away() -> None:
    """Against plain AdamW over the parameters that are not frozen."""
    torch.manual_seed(0)
    ours, theirs = (build_model(replace(GPT_SMALL, bias=False)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    freeze_and_add_lora(ours, freeze(*FROZEN))
    optimizer = Optimizer(ours, OptimizerConfig(lr=1e-2, clip_norm=None))
    trained = [parameter for name, parameter in theirs.named_parameters() if name in optimizer.names]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        for model in (ours, theirs):
            (next_token(model, TOKENS[:, :-1], TOKENS[:, 1:]) / 64).backward()
        optimizer.step(1e-2, 0.1)
        plain.step()
        theirs.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_a_run_with_frozen_layers_goes_on_bit_for_bit(tiny: Build, trainer: Open) -> None:
    whole = trainer(tiny(run_dir="whole", fine_tuning=freeze(*FROZEN)))
    whole.train()
    trainer(tiny(run_dir="parts", fine_tuning=freeze(*FROZEN), training__macro_batches=6)).train_macro_batch()
    first = trainer(tiny(run_dir="parts", fine_tuning=freeze(*FROZEN)))
    step = first.step

    def then() -> None:
        step()
        first.stopping.signals.requested = "SIGTERM" if first.position.step == 10 else None

    first.step = then  # type: ignore[method-assign]
    assert first.train() == "interrupted"
    second = trainer(tiny(run_dir="parts", fine_tuning=freeze(*FROZEN)))
    assert second.position.step == 10
    second.train()
    one, two = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_bias_by_which_experts_are_chosen_moves_unless_it_is_frozen() -> None:
    config = LlamaConfig(
        vocab_size=32, max_seq_len=16, n_layers=2, n_heads=2, dim=16, hidden_dim=16, n_experts=4, bias_update_rate=0.01
    )
    model = build_model(config)
    tuning = freeze("blocks.0.*")
    freeze_and_add_lora(model, tuning)
    balancing = ExpertLoadBalancer(model, lambda tensor: tensor, frozen_names(model, tuning))
    next_token(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    balancing.step()
    assert not model.blocks[0].mlp.router_bias.any() and model.blocks[1].mlp.router_bias.any()
    adapters = FineTuningConfig(lora=LoRAConfig(rank=2))
    assert {"blocks.0.mlp.router_bias", "blocks.1.mlp.router_bias"} <= frozen_names(model, adapters)


@given(st.data())
def test_a_pattern_freezes_what_a_plain_search_finds(data: st.DataObject) -> None:
    """A pattern with one star against prefix and suffix."""
    names = [name for name, _ in build_model(GPT_SMALL).named_parameters()]
    name = data.draw(st.sampled_from(names))
    start = data.draw(st.integers(0, len(name)))
    end = data.draw(st.integers(start, len(name)))
    expected = {
        other
        for other in names
        if other.startswith(name[:start]) and other.endswith(name[end:]) and len(other) >= start + len(name) - end
    }
    assert matching([f"{name[:start]}*{name[end:]}"], names, "field", "parameter") == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("block.0.*",), "fine_tuning.freeze: 'block.0.*' matches no parameter; did you mean 'blocks.0.*'?"),
        (("blocks.0.*", "embedding"), "'embedding' matches no parameter; did you mean 'token_embedding.*'?"),
        (("zzz",), "'zzz' matches no parameter; names begin with token_embedding, position_embedding, blocks, final"),
        (("*",), "fine_tuning.freeze is ('*',); allowed: patterns that leave a parameter to train"),
    ],
)
def test_a_pattern_that_matches_nothing_or_everything_is_refused_in_one_line(
    patterns: tuple[str, ...], message: str, tiny: Build
) -> None:
    with pytest.raises(UserError) as refused:
        check_tuning(tiny(model=GPT_SMALL, fine_tuning=freeze(*patterns)), Layout())
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tuning", "source", "message"),
    [
        (
            FineTuningConfig(lora=LoRAConfig(rank=2)),
            None,
            "lora.rank is 2; allowed without init_from: None",
        ),
        (FineTuningConfig(freeze=("a",), lora=LoRAConfig(rank=2)), "base", "allowed with fine_tuning.lora.rank: ()"),
        (FineTuningConfig(optimizer_state="kept"), None, "is 'kept'; allowed without init_from: reset"),
        (
            FineTuningConfig(optimizer_state="kept", lora=LoRAConfig(rank=2)),
            "base",
            "'kept'; allowed with fine_tuning.lora.rank, since adapters are new: reset",
        ),
    ],
)
def test_fields_that_do_not_fit_one_another_are_refused(
    tuning: FineTuningConfig, source: str | None, message: str, tiny: Build
) -> None:
    with pytest.raises(UserError) as refused:
        check(tiny(fine_tuning=tuning, init_from=source))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_adapters_are_refused_where_matrices_are_cut(tiny: Build) -> None:
    experiment = tiny(model=GPT_SMALL, init_from="base", fine_tuning=FineTuningConfig(lora=LoRAConfig(rank=2)))
    check_tuning(experiment, Layout(shards=2))
    with pytest.raises(UserError, match=r"lora\.rank is 2; allowed with tensor parallelism: None; use strategy fsdp"):
        check_tuning(experiment, Layout(tensor=2))


def test_what_is_frozen_cannot_change_on_the_way(tiny: Build) -> None:
    check_resumable(tiny(), tiny(fine_tuning=FineTuningConfig(layer_decay=0.9)))
    with pytest.raises(UserError, match=r"fine_tuning\.freeze is \[\] in this run and cannot become \['blocks"):
        check_resumable(tiny(), tiny(fine_tuning=freeze("blocks.0.*")))
    with pytest.raises(UserError, match=r"fine_tuning\.lora\.alpha is 16\.0 in this run and cannot become 8\.0"):
        check_resumable(tiny(), tiny(fine_tuning=FineTuningConfig(lora=LoRAConfig(alpha=8.0))))


# What is told --------------------------------------------------------------------------------------------------------


def test_the_summary_says_how_many_parameters_train_and_what_they_take(tiny: Build, trainer: Open) -> None:
    experiment = tiny(run_dir="run", fine_tuning=freeze("blocks.*"))
    tuned = trainer(experiment)
    store = prepare(experiment.corpus, Path(experiment.data.folder))
    lines = summary(experiment, tuned.run, store, tuned.model, tuned.device, tuned.layout)
    sizes = {name: parameter.numel() for name, parameter in tuned.model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if not name.startswith("blocks."))
    assert f"{sum(sizes.values()):,} parameters ({trained:,} of them train)" in lines[1]
    assert state_bytes(tuned.model) == 4 * sum(sizes.values()) + 12 * trained
    tuned.source.close()


def test_a_frozen_layer_spares_its_products_for_gradients() -> None:
    """Counted by PyTorch over one forward and backward pass, of linear layers alone."""
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(vocab_size=32, max_seq_len=16, n_layers=3, n_heads=2, dim=16, hidden_dim=24)
    model = build_model(config)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            model(TOKENS[:1, :16]).sum().backward()
        attention = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" in str(name))
        return (counter.get_total_flops() - attention) // 16

    def told() -> int:
        return flops_per_token(model, 0)

    assert told() == counted()
    freeze_and_add_lora(model, freeze("blocks.1.*", "final_norm.*"))
    assert told() == counted()
    freeze_and_add_lora(model, freeze("token_embedding.*", "blocks.0.*"))
    assert counted() <= told() < 1.15 * counted()


@pytest.mark.slow
def test_a_plan_counts_gradients_and_moments_of_what_trains_alone(tiny: Build) -> None:
    from cleangpt.distributed.datasheets import find_device
    from cleangpt.planning.plan import make_plan

    def memory(**fields: Any) -> Any:
        experiment = tiny(model=GPT_SMALL, **fields)
        return make_plan(experiment, find_device("h100", None), [1]).estimates[0].memory

    whole, frozen = memory(), memory(fine_tuning=freeze("blocks.*"))
    model = build_model(GPT_SMALL)
    share = 1 - sum(p.numel() for p in model.blocks.parameters()) / sum(p.numel() for p in model.parameters())
    assert frozen.weights == whole.weights and frozen.moments == pytest.approx(share * whole.moments)
    adapters = memory(init_from="base", fine_tuning=FineTuningConfig(lora=LoRAConfig(rank=1)))
    assert 0 < adapters.moments < 0.2 * whole.moments and adapters.gradients == pytest.approx(adapters.moments / 2)


# Rates by layer ------------------------------------------------------------------------------------------------------


def test_each_layer_has_the_rate_of_the_one_above_times_the_decay() -> None:
    factors = layer_factors(build_model(GPT_SMALL), 0.5)
    assert factors["final_norm.weight"] == 1
    for block, factor in enumerate((0.125, 0.25, 0.5)):
        assert {f for name, f in factors.items() if name.startswith(f"blocks.{block}.")} == {factor}
    assert factors["token_embedding.weight"] == factors["position_embedding.weight"] == 0.0625
    llama = LlamaConfig(vocab_size=32, max_seq_len=16, n_layers=2, n_heads=2, dim=16, hidden_dim=16)
    assert layer_factors(build_model(llama), 0.5)["head.weight"] == 1
    assert set(layer_factors(build_model(llama), 1.0).values()) == {1.0}


def test_steps_are_those_of_a_loop_over_parameters_with_rates_of_their_own() -> None:
    """The reference makes a step of plain AdamW for every parameter by itself."""
    torch.manual_seed(0)
    ours, theirs = build_model(GPT_SMALL), build_model(GPT_SMALL)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, OptimizerConfig(lr=1.0, clip_norm=None), factors=layer_factors(ours, 0.7))
    alone = {}
    for name, parameter in theirs.named_parameters():
        height = 4 if "embedding" in name else 3 - int(name.split(".")[1]) if name.startswith("blocks") else 0
        alone[name] = torch.optim.AdamW([parameter], betas=(0.9, 0.95), eps=1e-8, foreach=False)
        alone[name].param_groups[0]["factor"] = 0.7**height
    for rate, decay in ((1e-2, 0.1), (5e-3, 0.2), (1e-3, 0.0)):
        for model in (ours, theirs):
            (next_token(model, TOKENS[:, :-1], TOKENS[:, 1:]) / 64).backward()
        optimizer.step(rate, decay)
        for name, parameter in theirs.named_parameters():
            (group,) = alone[name].param_groups
            group["lr"], group["weight_decay"] = rate * group["factor"], decay * (parameter.dim() >= 2)
            alone[name].step()
        theirs.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_the_first_pattern_that_fits_multiplies_the_layers_factor() -> None:
    model = build_model(GPT_SMALL)
    config = OptimizerConfig(lr=1.0, lr_factors=(("*.mlp.up.*", 3.0), ("*.mlp.*", 5.0)))
    factors, by_layer = lr_factors(model, config, 0.5), layer_factors(model, 0.5)
    for name, factor in factors.items():
        assert factor == by_layer[name] * (3.0 if ".mlp.up." in name else 5.0 if ".mlp." in name else 1.0)
    with pytest.raises(UserError, match=r"optimizer\.lr_factors: 'heads\.\*' matches no parameter"):
        lr_factors(model, OptimizerConfig(lr=1.0, lr_factors=(("heads.*", 2.0),)), 1.0)


def test_a_model_without_blocks_has_no_layers_to_decay_over() -> None:
    with pytest.raises(UserError, match=r"layer_decay is 0\.9; allowed for LanguageModel, whose layers\(\) are empty"):
        layer_factors(LanguageModel(GPT_SMALL), 0.9)


class Renamed(LanguageModel):
    """A model whose blocks are called otherwise, stand between other parts, and begin with a part of their own."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(vocab_size=8, max_seq_len=8))
        self.norm_before = nn.LayerNorm(4)
        self.stem = nn.ModuleList([nn.Linear(4, 4)])
        self.trunk = nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 3)])
        self.out = nn.Linear(4, 8)
        self.table = nn.Embedding(8, 4)

    def layers(self) -> nn.ModuleList:
        return nn.ModuleList([*self.stem, *self.trunk])


def test_layers_are_those_that_the_model_names_as_its_own() -> None:
    factors = layer_factors(Renamed(), 0.5)
    assert {name: factor for name, factor in factors.items() if name.endswith("weight")} == {
        "norm_before.weight": 0.0625, "stem.0.weight": 0.125, "trunk.0.weight": 0.25, "trunk.1.weight": 0.5,
        "out.weight": 1.0, "table.weight": 0.0625,
    }  # fmt: skip


def test_muon_updates_the_matrices_of_the_layers_whatever_their_name() -> None:
    assert hidden_matrices(Renamed()) == {"stem.0.weight", "trunk.0.weight"}
    optimizer = Optimizer(Renamed(), OptimizerConfig(lr=1e-3, muon=MuonConfig(lr=1e-2)))
    assert {tuple(parameter.shape) for parameter in optimizer.hidden} == {(4, 4)} and len(optimizer.hidden) == 2


def test_muon_without_any_matrix_in_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "empty", (EmptyConfig, Empty))
    optimizer = OptimizerConfig(lr=1e-3, muon=MuonConfig(lr=1e-2))
    with pytest.raises(UserError, match=r"optimizer\.muon\.lr is 0\.01; allowed for Empty, whose layers\(\) have no"):
        check_parameters(FineTuningConfig(), EmptyConfig(vocab_size=8, max_seq_len=8), optimizer, Layout())


@pytest.mark.parametrize(
    ("tuning", "factors"), [(FineTuningConfig(), (("heads.*", 10.0),)), (freeze("heads.value.*"), ())]
)
def test_fields_may_name_the_heads_of_an_objective(tuning: FineTuningConfig, factors: tuple[Any, ...]) -> None:
    """Which the model alone does not have."""
    optimizer = OptimizerConfig(lr=1e-3, lr_factors=factors)
    check_parameters(tuning, GPT_SMALL, optimizer, Layout(), {"value"})
    with pytest.raises(UserError, match=r"'heads\..*' matches no parameter"):
        check_parameters(tuning, GPT_SMALL, optimizer, Layout())


@dataclass(frozen=True, kw_only=True)
class EmptyConfig(ModelConfig):
    """Of a model without layers."""


class Empty(LanguageModel):
    """A table, and no layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(8, 8)


# The optimizer's state -----------------------------------------------------------------------------------------------


def moments_of(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(entry) for name, entry in trainer.optimizer.state_dict()["moments"].items()}


KEPT = FineTuningConfig(optimizer_state="kept")


@pytest.mark.slow
def test_moments_begin_anew_or_are_those_of_the_newest_snapshot(tiny: Build, trainer: Open) -> None:
    base = trainer(tiny(run_dir="base"))
    base.train()
    kept = trainer(tiny(run_dir="kept", init_from="base", fine_tuning=KEPT))
    anew = trainer(tiny(run_dir="anew", init_from="base"))
    theirs, count = moments_of(base), len(base.optimizer.names)
    assert all(torch.equal(entry[key], theirs[name][key]) for name, entry in moments_of(kept).items() for key in entry)
    assert theirs["final_norm.weight"]["step"] == 24 and theirs["final_norm.weight"]["exp_avg"].any()
    assert not any(tensor.any() for entry in moments_of(anew).values() for tensor in entry.values())
    newest = list_snapshots(Path("base/snapshots"))[0]
    line = f"the optimizer starts with the moments of {count} of {count} parameters from {newest}"
    assert line in Path("kept/log.txt").read_text() and "moments" not in Path("anew/log.txt").read_text()
    for one in (kept, anew):
        one.source.close()


def test_moments_of_another_shape_or_name_are_left(tiny: Build, trainer: Open) -> None:
    base = trainer(tiny(run_dir="base"))
    base.train()
    fields = {"init_from": "base", "fine_tuning": KEPT, "model__vocab_size": 40, "model__n_layers": 3}
    wider = trainer(tiny(run_dir="wider", **fields))
    ours, theirs = moments_of(wider), moments_of(base)
    for name, entry in ours.items():
        if name == "token_embedding.weight" or name.startswith("blocks.2."):
            assert not any(tensor.any() for tensor in entry.values())
        else:
            assert all(torch.equal(entry[key], theirs[name][key]) for key in entry)
    taken = len(theirs) - 1
    assert f"moments of {taken} of {len(ours)} parameters" in Path("wider/log.txt").read_text()
    wider.source.close()


def test_moments_that_are_not_there_are_refused_before_anything_is_made(
    tiny: Build, trainer: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    base = trainer(tiny(run_dir="base", training__macro_batches=1))
    base.train()
    checkpoint = next(Path("base/checkpoints").glob("val*"))
    words = ["train", "adder", "--run-dir", "new", "--fine-tuning.optimizer-state", "kept"]
    capsys.readouterr()
    assert main([*words, "--init-from", str(checkpoint)]) == 2
    assert capsys.readouterr().err == (
        f"error: fine_tuning.optimizer_state is 'kept'; allowed with init_from {checkpoint}, which has no snapshots: "
        "reset\n"
    )
    assert main(["export", "base", "--out", "theirs"]) == 0
    assert main([*words, "--init-from", "hf:theirs"]) == 2
    assert "allowed with init_from hf:theirs, which has no snapshots: reset" in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_run_goes_on_when_what_it_started_from_is_gone(tiny: Build, trainer: Open) -> None:
    import shutil

    trainer(tiny(run_dir="base", training__macro_batches=1)).train()
    trainer(tiny(run_dir="tuned", training__macro_batches=1, init_from="base", fine_tuning=KEPT)).train()
    shutil.rmtree("base")
    assert main(["resume", "tuned", "--training.macro-batches", "2"]) == 0
    assert len(read_metrics(Path("tuned"))) == 2
    assert read_experiment(Path("tuned")).init_from == "base"


# Several processes ---------------------------------------------------------------------------------------------------

SEVERAL = """
import os
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora import CORPORA
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig

corpus = CORPORA["adder"](digits=2, train_samples=90, val_samples=40, test_samples=30)
size = {"max_seq_len": corpus.row_length - 1, "n_layers": 3, "n_heads": 2, "dim": 16}
TUNING = {
    "none": FineTuningConfig(),
    "freeze": FineTuningConfig(freeze=("token_embedding.*", "blocks.0.*", "blocks.1.mlp.*"), layer_decay=0.8),
    "lora": FineTuningConfig(lora=LoRAConfig(rank=2, alpha=4.0), layer_decay=0.8),
    "kept": FineTuningConfig(optimizer_state="kept"),
}
tuning = os.environ.get("TUNING", "none")
experiment = Experiment(
    name="several",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=8),
    model={"gpt": GPTConfig(**size), "llama": LlamaConfig(**size, hidden_dim=24)}[os.environ.get("MODEL", "gpt")],
    optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
    training=TrainingConfig(
        macro_batches=2, batches_per_macro_batch=6, accumulation=2, micro_batch_size=2, device="cpu", threads=1
    ),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(progress=False, sample_tokens=4, score_samples=4),
    init_from="base" if tuning != "none" else None,
    fine_tuning=TUNING[tuning],
)
"""


def train(processes: int, run: str, *words: str, **environment: str) -> None:
    outcome = run_together(processes, "train", "several.py", "--run-dir", run, *words, **environment)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


def assert_same_run(one: str, two: str) -> None:
    for ours, theirs in zip(read_metrics(Path(one)), read_metrics(Path(two)), strict=True):
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    first, second = (load_snapshot(list_snapshots(Path(run) / "snapshots")[0]) for run in (one, two))
    assert first["optimizer"]["moments"].keys() == second["optimizer"]["moments"].keys()
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        torch.testing.assert_close(tensor, second["model"][name], atol=2e-4, rtol=2e-3)


def assert_frozen(run: str, names: Callable[[str], bool]) -> None:
    """Those of the base's checkpoint, bit for bit."""
    from cleangpt.checkpoints.checkpoint import best_checkpoint, load_checkpoint

    began = load_checkpoint(best_checkpoint(Path("base"))).weights
    ended = load_snapshot(list_snapshots(Path(run) / "snapshots")[0])["model"]
    assert all(torch.equal(ended[name], tensor) == names(name) for name, tensor in began.items())


def is_frozen(name: str) -> bool:
    return name.startswith(("token_embedding.", "blocks.0.", "blocks.1.mlp."))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tuning", "strategies"),
    [
        ("gpt", "lora", ["fsdp"]),
        ("llama", "freeze", ["tp"]),
        *(
            pytest.param(model, tuning, strategies, marks=pytest.mark.torture)
            for model in ("gpt", "llama")
            for tuning, strategies in (
                ("freeze", ["ddp", "fsdp", "tp"]),
                ("lora", ["ddp", "fsdp"]),  # adapters are refused where matrices are cut
                ("kept", ["ddp", "fsdp", "tp"]),
            )
        ),
    ],
)
def test_frozen_layers_and_adapters_learn_the_same_on_several_processes(
    workplace: Path, model: str, tuning: str, strategies: list[str]
) -> None:
    (workplace / "several.py").write_text(SEVERAL)
    train(1, "base", MODEL=model)
    train(1, "one", MODEL=model, TUNING=tuning)
    for name in strategies:
        words = ["--training.recompute-every", "1"] if name == "fsdp" else []
        train(2, name, "--parallel.strategy", name, *words, MODEL=model, TUNING=tuning)
        assert_same_run("one", name)
        if tuning != "kept":
            assert_frozen(name, is_frozen if tuning == "freeze" else lambda name: True)
        assert not set(Path(name, "snapshots").glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["fsdp", "--training.precision", "bf16"],
        pytest.param(["fsdp", "--training.compile", "blocks"], marks=pytest.mark.torture),
    ],
)
def test_adapters_learn_on_cut_weights_in_bf16_and_compiled(workplace: Path, words: list[str]) -> None:
    (workplace / "several.py").write_text(SEVERAL)
    train(1, "base")
    train(1, "lora", TUNING="lora")
    train(2, "cut", "--parallel.strategy", *words, TUNING="lora")
    for ours, theirs in zip(read_metrics(Path("cut")), read_metrics(Path("lora")), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.03 if "bf16" in words else 1e-3)
    assert_frozen("cut", lambda name: True)


@pytest.mark.slow
def test_two_processes_with_copies_train_what_is_not_frozen(workplace: Path) -> None:
    (workplace / "several.py").write_text(SEVERAL)
    train(1, "base")
    train(1, "freeze", TUNING="freeze")
    train(2, "two", TUNING="freeze")
    assert_same_run("freeze", "two")
    assert_frozen("two", is_frozen)


def test_the_strategy_follows_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model too large to train whole on a device, and small enough where only adapters do."""
    from cleangpt.distributed import layout
    from cleangpt.distributed.processes import Ranks

    size = sum(parameter.numel() for parameter in build_model(GPT_SMALL).parameters())
    monkeypatch.setattr(layout, "device_memory", lambda device: 16 * size)
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)

    def choose(tuning: FineTuningConfig, *heads: str) -> Layout:
        ranks, cpu = Ranks(0, 0, 2), torch.device("cpu")
        return layout.choose_layout(
            ParallelConfig(), GPT_SMALL, ranks, cpu, lambda model: freeze_and_add_lora(model, tuning), heads
        )

    assert choose(FineTuningConfig()) == Layout(1, 2)
    assert choose(replace(FineTuningConfig(), lora=LoRAConfig(rank=1))) == Layout(2)
    assert choose(FineTuningConfig(freeze=("heads.*",)), "value") == Layout(1, 2)
