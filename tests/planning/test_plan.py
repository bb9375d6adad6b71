"""Plans of whole experiments: what fits, what it costs, what is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.commands import main
from cleangpt.distributed.datasheets import DEVICES, GIB, find_device
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.models.llama import LlamaConfig
from cleangpt.planning.communication import ProcessGroup
from cleangpt.planning.plan import make_plan

LARGE = LlamaConfig(
    vocab_size=128256, max_seq_len=8192, n_layers=126, n_heads=128, n_kv_heads=8, dim=16384, hidden_dim=53248
)


@pytest.fixture
def small(tiny: Callable[..., Experiment]) -> Experiment:
    return tiny(model__vocab_size=16, data__batch_size=32)


@pytest.mark.slow
def test_a_model_of_405_billion_parameters_is_planned_at_once(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(
        model=LARGE, data__seq_len=8192, data__batch_size=512, training__recompute_every=1, training__precision="bf16"
    )
    plan = make_plan(experiment, find_device("h100"), [512, 1024])
    assert plan.parameters == 405_853_388_800
    state = 16 * plan.parameters / 1024
    for entry in plan.estimates:
        if entry.strategy == "fsdp" and entry.devices == 1024:
            assert entry.memory.weights * 4 == pytest.approx(state)
    assert not next(entry for entry in plan.estimates if entry.strategy == "ddp").fits


@pytest.mark.slow
def test_the_budget_is_the_length_of_the_run_and_sets_hours_and_cost(small: Experiment) -> None:
    device = find_device("a100", price=2.0)
    plan, twice = make_plan(small, device, [4]), make_plan(small, device, [4], tokens=2 * 6 * 4 * 32 * 9)
    assert plan.tokens == 6 * 4 * 32 * small.data.seq_len
    for one, two in zip(plan.estimates, twice.estimates, strict=True):
        assert one.hours == pytest.approx(plan.tokens / one.tokens_per_second / 3600)
        assert one.cost == pytest.approx(one.hours * 4 * 2.0)
        assert two.hours / one.hours == pytest.approx(twice.tokens / plan.tokens)


@pytest.mark.slow
def test_what_does_not_fit_is_marked_and_settings_that_fit_are_advised(tiny: Callable[..., Experiment]) -> None:
    model = LlamaConfig(vocab_size=32000, max_seq_len=4096, n_layers=22, n_heads=32, dim=2048, hidden_dim=5632)
    experiment = tiny(model=model, data__seq_len=4096, data__batch_size=64, training__precision="bf16")
    plan = make_plan(experiment, find_device("h100"), [1])
    assert [entry.fits for entry in plan.estimates] == [False] and not plan.fitting()
    (advice,) = plan.advice
    size = int(re.findall(r"--training.micro-batch-size (\d+)", advice)[0])
    fields = {"training__recompute_every": 1} if "--training.recompute-every 1" in advice else {}
    if "--training.recompute selective" in advice:
        fields["training__recompute"] = "selective"
    smaller = tiny(
        model=model, data__seq_len=4096, data__batch_size=64, training__precision="bf16",
        training__micro_batch_size=size, **fields,
    )  # fmt: skip
    assert make_plan(smaller, find_device("h100"), [1]).fitting()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_with_its_reason(small: Experiment) -> None:
    plan = make_plan(small, find_device("h100"), [32, 48])
    assert {entry.devices for entry in plan.estimates} == {32}
    assert any(line.startswith("48 devices, fsdp: data.batch_size 32") for line in plan.refused)
    with pytest.raises(UserError, match="no strategy can run"):
        make_plan(small, find_device("h100"), [48])


@pytest.mark.slow
def test_the_experiments_own_strategy_is_among_those_planned(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(
        model__vocab_size=16, data__batch_size=32, parallel__strategy="hsdp", parallel__replicas=4
    )  # fmt: skip
    own = [entry for entry in make_plan(experiment, find_device("h100"), [8]).estimates if entry.chosen]
    assert [(entry.layout.replicas, entry.layout.shards) for entry in own] == [(4, 2)]


@given(st.sampled_from(sorted(DEVICES)), st.integers(2, 64), st.floats(1, 1e11))
def test_communication_takes_at_least_what_the_link_needs_and_grows_with_the_size(
    name: str, size: int, much: float
) -> None:
    group = ProcessGroup(DEVICES[name], size, 1, 8)
    assert group.seconds(much) >= much * (size - 1) / size / max(DEVICES[name].link, 8 * DEVICES[name].network)
    assert group.seconds(2 * much) > group.seconds(much)
    assert ProcessGroup(DEVICES[name], 1, 1, 8).seconds(much) == 0


def test_each_collective_has_its_latency() -> None:
    group = ProcessGroup(DEVICES["h100"], 8, 1, 8)
    once, often = group.seconds(GIB), group.seconds(GIB, 100)
    assert often - once == pytest.approx(99 * 7 * 3.4e-6)


@pytest.mark.slow
def test_tensor_parallelism_does_not_pay_for_a_small_model(tiny: Callable[..., Experiment]) -> None:
    """It launches as many kernels and waits for the other devices often."""
    plan = make_plan(
        tiny(model__vocab_size=16, data__batch_size=256, training__precision="fp32"), find_device("a100"), [8]
    )
    speed = {entry.strategy: entry.tokens_per_second for entry in plan.estimates}
    assert speed["ddp"] > speed["fsdp, tensor 2"] and plan.best(8).layout.tensor == 1


DIFFERENT = (
    "adder",
    "adder_grpo",
    "cartpole_ppo",
    "fables_dpo",
    "fables_grpo",
    "fables_ppo",
    "gato_small",
    "shapes_vit",
    "stdlib_fast",
    "stories_from_pretrained",
    "tinystories_llama",
)
"""Experiments that together have every architecture, objective and kind of tuning that a plan tells apart."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in DIFFERENT else pytest.mark.torture) for name in sorted(experiments())],
)
def test_every_experiment_of_the_project_is_planned(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    experiment = replace(experiment, model=replace(experiment.model, vocab_size=experiment.model.vocab_size or 512))
    plan = make_plan(experiment, find_device("h100"), [1, 2, 4])
    assert {entry.devices for entry in plan.estimates} == {1, 2, 4} and plan.fitting()
    json.dumps(plan.to_json(), allow_nan=False)


@pytest.mark.default(1)
@pytest.mark.parametrize("name", ["fables_dpo", "adder_grpo", "adder_ppo"])
def test_preferences_and_policies_are_planned_with_what_they_read(name: str) -> None:
    """A policy's rounds take longer than their updates alone, and a copy of the model is its reference; pairs stay
    together in a micro-batch."""
    experiment = load_experiment(experiments()[name])
    experiment = replace(experiment, model=replace(experiment.model, vocab_size=512))
    device = find_device("l4")
    found = make_plan(replace(experiment, training=replace(experiment.training, micro_batch_size=9)), device, [2])
    policy = experiment.objective.on_policy
    assert len(found.notes) == 1 and ("rollouts" if policy else "reference") in found.notes[0]
    for entry in found.estimates:
        assert experiment.data.batch_size % entry.micro_batch == 0 and entry.micro_batch <= 9
        assert policy or entry.micro_batch % 2 == 0
        assert (entry.time.sampling > 0, entry.time.looking_back > 0) == (policy, policy)
        assert entry.memory.reference == (entry.memory.weights if policy else 0)
    if not policy:
        return
    one, more = (
        make_plan(replace(experiment, rollouts=replace(experiment.rollouts, **fields)), device, [1]).best(1).time
        for fields in ({}, {"passes": 2, "measure_kl": False})
    )
    assert more.sampling == pytest.approx(one.sampling / 2), "twice the updates for a round"
    values = "value" in experiment.objective.heads
    assert more.looking_back == pytest.approx(one.looking_back / 4 if values else 0)


@pytest.mark.parametrize("name", ["fables_reward", "adder_ppo"])
def test_scalar_heads_are_planned_and_can_be_frozen_or_have_a_rate_of_their_own(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    optimizer = replace(experiment.optimizer, lr_factors=(("heads.*", 2.0),), base_dim=48)
    tuning = replace(experiment.fine_tuning, freeze=("heads.*",))
    model = replace(experiment.model, vocab_size=512)
    found = make_plan(replace(experiment, model=model, optimizer=optimizer, fine_tuning=tuning), find_device("l4"), [1])
    assert found.fitting()


def test_devices_far_apart_share_no_network_adapters() -> None:
    near, far = (ProcessGroup(DEVICES["h100"], 16, stride, 8).seconds(GIB) for stride in (1, 8))
    assert far > 5 * near


def test_the_command_prints_a_table_and_writes_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "adder", "--model.vocab-size", "16", "--devices", "1", "2", "--device", "4090", "--price", "0.5"]
    assert main([*words, "--training.micro-batch-size", "2", "--json", "plan.json"]) == 0
    printed = capsys.readouterr().out
    assert "cheapest that fits: " in printed and "$0.50 an hour" in printed
    plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    assert {entry["micro_batch"] for entry in plan["estimates"]} == {2}
    assert not Path("runs").exists() and not Path("data").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adder_grpo", "adder_ppo"])
def test_the_command_plans_a_policy(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", name, "--model.vocab-size", "16", "--device", "4090", "--price", "0.5"]
    assert main([*words, "--rollouts.passes", "2", "--optimizer.base-dim", "48"]) == 0
    printed = capsys.readouterr().out
    assert "cheapest that fits: " in printed and "rollouts: every answer is taken to have 12 tokens" in printed


@pytest.mark.default(1)
@pytest.mark.parametrize("tokens", ["100", "10000000", "10000000000000"])
def test_what_is_printed_has_three_significant_digits(
    tokens: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However short or long the run, small the model, or cheap the machine."""
    words = ["plan", "adder", "--model.vocab-size", "16", "--device", "4090", "--price", "0.005", "--tokens", tokens]
    assert main([*words, "--json", "plan.json"]) == 0
    (entry,) = json.loads(Path("plan.json").read_text(encoding="utf-8"))["estimates"]
    printed = capsys.readouterr().out
    assert "$0.00500 an hour" in printed
    line = next(line.split() for line in printed.splitlines() if "one device" in line)
    size, hours, cost = (float(line[at].strip("$").replace(",", "")) for at in (4, -2, -1))
    assert hours == pytest.approx(entry["hours"], rel=5e-3) and cost == pytest.approx(entry["cost"], rel=5e-3)
    assert size == pytest.approx(sum(entry["memory"].values()) / GIB, rel=5e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "h10"], "did you mean 'h100'"),
        (["--devices", "0"], "--devices is 0"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--price", "-1"], "--price is -1.0"),
        (["--json", "nowhere/plan.json"], "--json is 'nowhere/plan.json'; allowed: a file in a folder that exists"),
        (["--json", "."], "--json is '.'; allowed: a file"),
        (["--devices", "1000000000"], "data.batch_size 256 is not a multiple of its 1000000000"),
        (
            ["--model.dim", "3000000000", "--model.n-heads", "1"],
            "model.dim is 3000000000; allowed: a whole number of 1 or more, at most 1,048,576",
        ),
        (["--training.precision", "fp8", "--device", "a100"], "allowed with --device a100: auto, fp32"),
        (["--model.vocab-size", "None"], "give --model.vocab-size"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    words: list[str], expected: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "adder", "--model.vocab-size", "16", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_the_vocabulary_size_comes_from_a_prepared_corpus(workplace: Path) -> None:
    assert main(["prepare", "adder"]) == 0
    assert main(["plan", "adder"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_sessions_in_the_documents_are_what_the_command_prints(
    number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "112")
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    sessions = re.findall(r"```bash\ncleangpt ([^\n]*)\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    command, expected = sessions[number]
    assert main(command.split()) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == expected.splitlines()
