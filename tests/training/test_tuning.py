"""`cleangpt tune` finds the rate at which short runs learn most, in runs that are those of the trainer."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.commands import main
from cleangpt.config import MuonConfig, SavingConfig, Schedule, ScheduleConfig
from cleangpt.distributed.processes import Ranks
from cleangpt.experiment import Experiment
from cleangpt.files import sha256
from cleangpt.tracking.metrics import read_metrics
from cleangpt.tracking.numbers import show_number
from cleangpt.training.launch import prepare_dataset
from cleangpt.training.trainer import Trainer
from cleangpt.training.tuning import MOST_RATES, Tuning, advice, score_of, search, short_run, with_lr
from tests.commands.test_commands import EXPERIMENT, error_of
from tests.forked import run_together
from tests.rollouts.conftest import policy  # noqa: F401 - a fixture

# The search ----------------------------------------------------------------------------------------------------------

LOSSES = st.one_of(st.floats(-10, 10), st.just(math.inf))


@st.composite
def valleys(draw: st.DrawFn) -> tuple[list[float], int]:
    """Losses that fall to one place, rise after it and are infinite at the highest rates; and where to begin."""
    falling = sorted(draw(st.lists(st.floats(-10, 10), min_size=1, max_size=12, unique=True)), reverse=True)
    rising = sorted(draw(st.lists(st.floats(falling[-1], 20, exclude_min=True), max_size=6)))
    losses = [*falling, *rising, *[math.inf] * draw(st.integers(1, 3))]
    return losses, draw(st.integers(0, len(losses) - 1))


@given(valleys())
def test_a_search_finds_the_bottom_of_a_valley(valley: tuple[list[float], int]) -> None:
    losses, start = valley
    found = search(lambda place: losses[start + place] if 0 <= start + place < len(losses) else math.inf, most=50)
    lowest = min(found, key=lambda place: found[place])
    assert found[lowest] == min(losses)


@given(st.lists(LOSSES, min_size=60, max_size=60), st.integers(1, 25))
def test_a_search_ends_between_two_worse_neighbours_and_asks_once_for_each_place(
    losses: list[float], most: int
) -> None:
    asked = []

    def loss(place: int) -> float:
        asked.append(place)
        return losses[30 + place]

    found = search(loss, most)
    assert asked == list(found) and len(asked) == len(set(asked)) <= most
    assert sorted(asked) == list(range(min(asked), max(asked) + 1))
    if len(asked) < most:
        lowest = min(found, key=lambda place: (found[place], place))
        assert found[lowest - 1] > found[lowest] <= found[lowest + 1]


def test_a_search_without_a_lowest_place_ends() -> None:
    assert min(search(lambda place: place)) == 1 - MOST_RATES
    assert max(search(lambda place: -place)) == MOST_RATES - 2


# The short runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 8, 9])
def test_a_short_run_has_so_many_steps_of_the_full_batch_size_in_four_macro_batches(
    tiny: Callable[..., Experiment], steps: int
) -> None:
    growing = ScheduleConfig(batch_size=Schedule(shape="linear", initial=0.5, final=2.0))
    short = short_run(tiny(training__accumulation=2, schedule=growing), steps, None)
    assert short.training.macro_batches == 4
    assert short.training.batches_per_macro_batch == 4 * math.ceil(steps / 4)


def test_a_narrower_run_imitates_the_width_of_the_experiment(tiny: Callable[..., Experiment]) -> None:
    for base_dim, expected in ((None, 16), (32, 32)):
        short = short_run(tiny(optimizer__base_dim=base_dim), 8, 8)
        assert (short.model.dim, short.model.n_heads, short.optimizer.base_dim) == (8, 1, expected)
    assert short_run(tiny(), 8, None).optimizer.base_dim is None


def test_muons_rate_keeps_its_ratio_to_the_other(tiny: Callable[..., Experiment]) -> None:
    changed = with_lr(tiny(optimizer__lr=0.01, optimizer__muon=MuonConfig(lr=0.04)), 0.005)
    assert (changed.optimizer.lr, changed.optimizer.muon.lr) == (0.005, 0.02)


@pytest.mark.parametrize(
    ("best", "metric", "sign"),
    [
        ("lowest val_loss", "train_loss", 1), ("highest val_accuracy", "train_accuracy", -1),
        ("highest exact_match", "exact_match", -1), ("lowest train_kl", "train_kl", 1),
    ],
)  # fmt: skip
def test_rates_are_compared_by_the_metric_of_the_best_checkpoint(
    tiny: Callable[..., Experiment], best: str, metric: str, sign: int
) -> None:
    """Of training in place of validation."""
    short = short_run(tiny(saving=SavingConfig(best=best)), 8, None)
    assert score_of(short) == (metric, sign)
    assert (short.tracking.score_samples > 0) == (metric == "exact_match")


@pytest.mark.slow
def test_a_policys_rate_is_found_by_its_score_in_whole_rounds(
    policy: Callable[..., Experiment],  # noqa: F811
    tmp_path: Path,
    workplace: Path,
) -> None:
    short = short_run(policy(), 3, None)
    assert short.training.batches_per_macro_batch == 4, "a round has four batches"
    experiment, dataset = prepare_dataset(short, Ranks())
    lines = list[str]()
    tuning = Tuning(experiment, tmp_path, dataset, Ranks(), lines.append)
    loss = tuning.loss(0.01)
    score = read_metrics(tmp_path / "lr_0.01")[-1]["exact_match"]
    assert loss == -score and json.loads((tmp_path / "tune.json").read_text())["rates"] == [
        {"lr": 0.01, "exact_match": score}
    ]
    assert lines == [f"lr 0.01       exact_match {show_number(score, 4)}"]
    assert Tuning(experiment, tmp_path, dataset, Ranks(), lines.append).losses == {0.01: loss}
    assert advice(experiment, {0.01: -0.5, 0.02: -0.7})[1] == "0.02       exact_match 0.7000  highest"


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(workplace: Path) -> str:
    (workplace / "own.py").write_text(EXPERIMENT)
    return "own.py"


def tune(*words: str, out: str = "tuned") -> dict[float, float | None]:
    """The losses by rate in tune.json."""
    assert main(["tune", "own.py", "--steps", "8", "--out", out, *words]) == 0
    return {row["lr"]: row["loss"] for row in json.loads(Path(out, "tune.json").read_text())["rates"]}


@pytest.mark.slow
def test_the_loss_of_a_rate_is_that_of_the_end_of_a_run_by_hand(
    own: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = tune("--rates", "0.02", "0.003")
    printed = capsys.readouterr().out
    for lr, loss in losses.items():
        shape = ["--training.macro-batches", "4", "--training.batches-per-macro-batch", "2"]
        assert main(["train", own, *shape, "--optimizer.lr", str(lr), "--run-dir", f"by_hand_{lr}"]) == 0
        assert read_metrics(Path(f"by_hand_{lr}"))[-1]["train_loss"] == loss
        assert f"{lr:<10g} loss {show_number(loss, 4)}" in printed
    best = min(losses, key=lambda lr: losses[lr] or 0.0)
    assert printed.endswith(f"{best:g} is at the end of the rates tried; a higher one may do better\n"
                            f"train with: --optimizer.lr {best:g}\n")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["adder_grpo", "adder_ppo"])
def test_the_command_finds_the_rate_of_a_policy(
    objective: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its score, which is highest where it is the best."""
    small = ["--corpus.train-samples", "99", "--corpus.val-samples", "9", "--corpus.test-samples", "9"]
    sizes = ["--rollouts.prompts", "8", "--rollouts.completions", "2", "--data.batch-size", "16", "--model.dim", "16",
             "--training.batches-per-macro-batch", "1", "--tracking.score-samples", "8"]  # fmt: skip
    words = ["tune", objective, "--init-from", "None", "--steps", "4", "--rates", "0.001", "0.01", "--out", "tuned"]
    assert main([*words, *small, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "0.001      exact_match 0" in printed and "train with: --optimizer.lr 0.001" in printed
    assert set(json.loads(Path("tuned/tune.json").read_text())["rates"][0]) == {"lr", "exact_match"}


@pytest.mark.slow
def test_a_search_brackets_the_lowest_loss_and_is_the_same_again(own: str) -> None:
    losses = tune("--factor", "4")
    rates = sorted(losses)
    assert 0.01 in rates and len(rates) >= 3
    assert all(high == pytest.approx(4 * low) for low, high in itertools.pairwise(rates))
    assert min(losses, key=lambda lr: losses[lr] or math.inf) in rates[1:-1]
    assert tune("--factor", "4", out="again") == losses


def test_the_validation_split_is_not_looked_at(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("cleangpt.training.validator.validate", refuse)
    monkeypatch.setattr("cleangpt.training.validator.validation_batches", refuse)
    tune("--rates", "0.01")
    assert {path.name for path in Path("tuned/lr_0.01").iterdir()}.isdisjoint({"checkpoints", "snapshots"})


@pytest.mark.slow
def test_a_rate_that_diverges_is_infinitely_bad(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--rates", "0.01", "1e30")[1e30] is None
    assert "1e+30      diverged" in capsys.readouterr().out
    downhill = tune("--optimizer.lr", "1e30", "--factor", "1e16", out="downhill")
    assert downhill[1e30] is None and downhill[0.01] is not None and max(downhill) == 1e30
    assert main(["tune", own, "--steps", "8", "--rates", "1e30", "--out", "other"]) == 1
    assert "every rate diverged" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(
    own: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ("--rates", "0.01", "0.02", "0.04")
    expected = tune(*rates, out="whole")
    steps, plain = [], Trainer.step

    def step(self: Trainer) -> None:
        plain(self)
        steps.append(float(self.run.name.removeprefix("lr_")))
        if len(steps) == 8 + 3:
            self.stopping.signals.requested = "SIGTERM"

    monkeypatch.setattr(Trainer, "step", step)
    capsys.readouterr()
    assert list(tune(*rates)) == [0.01]
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted and saved; the same command continues"
    assert tune(*rates) == expected
    assert steps == [0.01] * 8 + [0.02] * 8 + [0.04] * 8
    assert tune(*rates) == expected and len(steps) == 24


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_find_what_one_does(own: str, strategy: str) -> None:
    words = ["--rates", "0.01", "1e30", "0.02", "--optimizer.base-dim", "8"]
    expected = tune(*words)
    several = [*words, "--steps", "8", "--out", "several", "--parallel.strategy", strategy]
    ended = run_together(2, "tune", own, *several)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("train with:") == 1
    found = {row["lr"]: row["loss"] for row in json.loads(Path("several", "tune.json").read_text())["rates"]}
    assert found.pop(1e30) is expected.pop(1e30) is None
    assert found == pytest.approx(expected, rel=1e-4)


def test_rates_are_not_compared_with_those_of_other_data(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also not where a rate was interrupted before the first was known."""
    tune("--rates", "0.01")
    (tokens,) = Path("data").glob("*/train_00000.bin")
    description = tokens.with_name("dataset.json")
    facts = json.loads(description.read_text())
    tokens.write_bytes(tokens.read_bytes()[::-1])
    facts["sha256"][tokens.name] = sha256(tokens)
    description.write_text(json.dumps(facts))
    before = Path("tuned/tune.json").read_text()
    line = error_of(capsys, "tune", own, "--steps", "8", "--out", "tuned", "--rates", "0.01", "0.02")
    assert "tuned holds rates that were tried on other data; give another --out" in line
    Path("tuned/tune.json").unlink()
    line = error_of(capsys, "tune", own, "--steps", "8", "--out", "tuned", "--rates", "0.01")
    assert "train_00000.bin is not the one that this run started with" in line
    assert not Path("tuned/tune.json").exists()
    Path("tuned/tune.json").write_text(before)


def test_the_folder_of_another_tuning_is_refused(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    tune("--rates", "0.01")
    line = error_of(capsys, "tune", own, "--steps", "12", "--out", "tuned")
    assert "training.batches_per_macro_batch is 2 there and 3 here; give another --out" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0; allowed: a whole number of 1 or more"),
        (["--factor", "1"], "--factor is 1.0; allowed: a number above 1"),
        (["--rates", "0.1", "-1"], "--rates is (0.1, -1.0); allowed: a tuple of a number above 0"),
        (["--width", "12"], "a width of 12 does not fit a model of dim 16, n_heads 2; allowed: multiples of 8"),
        (
            ["--width", "8", "--init-from", "x"],
            "--width is 8; allowed with init_from, whose weights have a width: None",
        ),
        (["--optimizer.lr", "0"], "optimizer.lr is 0"),
        (["--optimizer.lrr", "0"], "did you mean '--optimizer.lr'?"),
    ],
)
def test_mistakes_are_one_line(own: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in error_of(capsys, "tune", own, *words)
    assert not Path("runs").exists()
