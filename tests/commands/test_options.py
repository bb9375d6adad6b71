"""A command line becomes a dataclass, or one line that says what is wrong with it."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from cleangpt.commands import train
from cleangpt.commands.fields import FLAT, POSITIONAL, VERBATIM, find_options
from cleangpt.commands.options import parse
from cleangpt.config import MuonConfig, OptimizerConfig, Schedule
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.validation import Count, Metavar, Share


@pytest.fixture(scope="module")
def adder() -> Experiment:
    return load_experiment(experiments()["adder"])


@dataclass
class Cake:
    """What to bake."""

    name: Annotated[str, POSITIONAL]
    schedule: Annotated[Schedule, FLAT] = Schedule()  # noqa: RUF009 - frozen
    oven: OptimizerConfig = OptimizerConfig(lr=0.5)  # noqa: RUF009 - frozen
    layers: Count = 1
    sizes: tuple[Annotated[int, Metavar("CM")], ...] = ()
    range: tuple[Share, Share] = (0.0, 1.0)
    icing: Literal["sugar", "lemon"] | None = None
    kind: Literal["round", "square"] = "round"
    weight: float | tuple[tuple[float, float], ...] = 1.0
    wish: Annotated[str | None, VERBATIM] = None
    file: str | None = "recipe.txt"
    glaze: bool = True
    candles: bool = False


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("plum", {}),
        ("plum --layers=3 --no-glaze --candles", {"layers": 3, "glaze": False, "candles": True}),
        ("plum --glaze --no-candles", {}),
        ("--kind square --sizes=20 24 --layers 1 plum", {"sizes": (20, 24), "kind": "square"}),
        ("plum --sizes 20 24 --icing lemon", {"sizes": (20, 24), "icing": "lemon"}),
        ("plum --sizes 20 --layers 2 --sizes 24 --sizes=28", {"sizes": (20, 24, 28), "layers": 2}),
        ("plum --range 0 0.1 --range 0.2 1 --weight 3 --weight 4", {"range": (0.2, 1.0), "weight": 4.0}),
        ("plum --range 0.1 1", {"range": (0.1, 1.0)}),
        ("--range 0.1 1 plum", {"range": (0.1, 1.0)}),
        ("plum --warmup 0.5", {"schedule": Schedule(warmup=0.5)}),
        ("plum --weight 2", {"weight": 2.0}),
        ("plum --weight 0 2 1 3", {"weight": ((0.0, 2.0), (1.0, 3.0))}),
        ("plum --oven.lr-factors a.* 2 b 3", {"oven": OptimizerConfig(lr=0.5, lr_factors=(("a.*", 2.0), ("b", 3.0)))}),
        ("plum --oven.eps 1 --oven.betas 0 0.5", {"oven": OptimizerConfig(lr=0.5, eps=1, betas=(0.0, 0.5))}),
        ("plum --oven.muon.lr 1", {"oven": OptimizerConfig(lr=0.5, muon=MuonConfig(lr=1.0))}),
    ],
)
def test_a_right_command_line_becomes_the_dataclass(words: str, fields: dict[str, Any]) -> None:
    assert parse(Cake, words.split(), program="bake") == Cake("plum", **fields)


@pytest.mark.parametrize("none", ["none", "None", "null", "NULL"])
@pytest.mark.parametrize("option", ["--icing", "--file", "--oven.clip-norm", "--oven.base-dim"])
def test_every_option_that_may_be_none_takes_it_in_each_spelling(option: str, none: str) -> None:
    made = parse(Cake, ["plum", option, none], program="bake")
    values = {"--icing": made.icing, "--file": made.file, "--oven.clip-norm": made.oven.clip_norm}
    assert values.get(option, made.oven.base_dim) is None


@pytest.mark.parametrize("text", ["none", "None", "null", "two words", ""])
def test_a_text_of_ones_own_is_taken_as_it_is(text: str) -> None:
    assert parse(Cake, ["plum", "--wish", text], program="bake").wish == text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("plum --layer 3", "--layer is not an option; did you mean '--layers'?; see --help"),
        ("plum --layers many", "--layers is 'many'; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --layers 0", "--layers is 0; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --layers none", "--layers is 'none'; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --layers", "--layers needs a value; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --warmup -1", "--warmup is -1.0; allowed: a number of 0 or more, at most 1"),
        ("plum --oven.lr nan", "--oven.lr is nan; allowed: a number of 0 or more"),
        ("plum --sizes 20 wide", "--sizes is '20 wide'; allowed: a tuple of a whole number, …"),
        ("plum --range 0.5", "--range is '0.5'; allowed: a tuple of a number of 0 or more, at most 1, a number of 0 "
         "or more, at most 1"),
        ("plum --weight 1 2 3",
         "--weight is '1 2 3'; allowed: a number or a tuple of a tuple of a number, a number, …"),
        ("plum --kind squar", "--kind is 'squar'; allowed: round, square; did you mean 'square'?"),
        ("plum --icing salt", "--icing is 'salt'; allowed: sugar, lemon or None"),
        ("plum pear", "unexpected argument 'pear'; see --help"),
        ("plum --candles yes", "unexpected argument 'yes'; see --help"),
        ("plum --glaze=no", "--glaze takes no value; --no-glaze switches it off"),
        ("--layers 2", "NAME is missing; see --help"),
        ("plum --oven 180", "--oven is not an option, but the start of others: --oven.lr, --oven.weight-decay, "
         "--oven.betas, …; see --help"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(words: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Cake, words.split(), program="bake")
    assert str(caught.value) == line


def test_a_required_option_is_named() -> None:
    @dataclass
    class Needy:
        files: tuple[str, ...]

    with pytest.raises(UserError, match=r"^--files is missing; see --help$"):
        parse(Needy, [], program="read")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--lr", "did you mean '--optimizer.lr' or '--optimizer.muon.lr'?"),
        ("--LR", "did you mean '--optimizer.lr' or '--optimizer.muon.lr'?"),
        ("--model.lr", "did you mean '--optimizer.lr' or '--optimizer.muon.lr'?"),
        ("--batch_size", "did you mean '--data.batch-size'"),
        ("--batchsize", "did you mean '--data.batch-size'"),
        ("--steps", "did you mean '--training.steps'?"),
        ("--progress", "did you mean '--tracking.progress'?"),
        ("--no-progress", "did you mean '--tracking.no-progress'?"),
        ("--n-layer", "did you mean '--model.n-layers' or '--model.vision.n-layers'?"),
        ("--optimizer.lrr", "did you mean '--optimizer.lr'?"),
        ("--schedule.lr", "the start of others: --schedule.lr.shape, --schedule.lr.initial, --schedule.lr.final, …"),
        ("--cod", "did you mean '--code'?"),
    ],
)
def test_a_name_that_is_not_an_option_is_answered_with_those_that_end_like_it(
    given: str, hint: str, adder: Experiment
) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        parse(train.Options, [given, "1"], program="train", given={"experiment": adder})


def test_the_last_part_of_every_option_leads_to_it(adder: Experiment) -> None:
    """Unless it has too many namesakes, or is the start of others."""
    options = [option.name for option in find_options(train.Options, {"experiment": adder})]
    ends = {name.rpartition(".")[2] for name in options if "." in name} - {name.removeprefix("--") for name in options}
    for end in ends - {"lr", "weight-decay", "batch-size"}:
        whole = [name for name in options if name.rpartition(".")[2] == end]
        with pytest.raises(UserError) as caught:
            parse(train.Options, [f"--{end}", "1"], program="train", given={"experiment": adder})
        assert all(f"'{name}'" in str(caught.value) for name in whole[:3] if len(whole) <= 3)


@pytest.mark.parametrize("name", ["adder", "mixture_code_shakespeare", "shakespeare_char_fast", "tinystories_llama"])
def test_an_experiment_without_overrides_stays_as_it_is(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    assert parse(train.Options, [], program="train", given={"experiment": experiment}).experiment == experiment


def test_the_sources_of_a_mixture_are_numbered() -> None:
    experiment = load_experiment(experiments()["mixture_code_shakespeare"])
    words = ["--corpus.sources.1.corpus.file", "input.txt", "--corpus.sources.0.weight", "0", "1", "1", "2"]
    sources = parse(train.Options, words, program="train", given={"experiment": experiment}).experiment.corpus.sources
    assert sources[1].corpus.file == "input.txt" and sources[0].weight == ((0.0, 1.0), (1.0, 2.0))
    assert sources[0].corpus == experiment.corpus.sources[0].corpus
