"""Options are found in the dataclass as tyro finds them, and what is wrong with a command line is one line."""

import contextlib
import dataclasses
import io
import re
from typing import Annotated, Any, Literal

import pytest
import tyro

from cleangpt.commands.options import CONFIG, FLAT, find_options, parse
from cleangpt.config import Schedule
from cleangpt.errors import UserError
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.validation import Count, Share


@pytest.mark.parametrize("name", ["adder", "mixture_code_shakespeare", "shakespeare_char_fast"])
def test_options_are_those_of_the_parser(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    kind: Any = dataclasses.make_dataclass("Options", [("experiment", Annotated[type(experiment), FLAT], experiment)])
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], config=CONFIG)
    assert set(re.findall(r"--[a-z][\w.-]*", text.getvalue())) - {"--help"} == dict(find_options(kind)).keys()


@dataclasses.dataclass
class Cake:
    """What to bake."""

    name: tyro.conf.Positional[str]
    schedule: Annotated[Schedule, FLAT] = Schedule()  # noqa: RUF009 - frozen
    layers: Count = 1
    sizes: tuple[Annotated[int, tyro.conf.arg(help="In cm.")], ...] = ()
    range: tuple[Share, Share] = (0.0, 1.0)
    icing: Literal["sugar", "lemon"] | None = None
    kind: Literal["round", "square"] = "round"
    glaze: bool = True
    candles: bool = False


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("plum", {}),
        ("plum --layers=3 --no-glaze --candles", {"layers": 3, "glaze": False, "candles": True}),
        ("--sizes 20 24 --kind square plum", {}),
        ("plum --sizes 20 24 --icing lemon", {"sizes": (20, 24), "icing": "lemon"}),
        ("plum --range 0.1 1 --icing None", {"range": (0.1, 1.0)}),
        ("plum --warmup 0.5", {"schedule": Schedule(warmup=0.5)}),
    ],
)
def test_a_right_command_line_becomes_the_dataclass(words: str, fields: dict[str, Any]) -> None:
    made = parse(Cake, words.split(), program="bake")
    expected = {"sizes": (20, 24), "kind": "square"} if words.startswith("--sizes") else fields
    assert made == Cake("plum", **expected)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("plum --layer 3", "--layer is not an option; did you mean '--layers'?; see --help"),
        ("plum --layers many", "--layers is 'many'; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --layers 0", "--layers is 0; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --layers", "--layers needs a value; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ("plum --warmup -1", "--warmup is -1.0; allowed: a number of 0 or more, at most 1"),
        ("plum --sizes 20 wide", "--sizes is (20, 'wide'); allowed: a tuple of a whole number, …"),
        ("plum --range 0.5", "--range is ('0.5',); allowed: a tuple of a number of 0 or more, at most 1, a number of 0 "
         "or more, at most 1"),
        ("plum --kind squar", "--kind is 'squar'; allowed: round, square; did you mean 'square'?"),
        ("plum --icing salt", "--icing is 'salt'; allowed: sugar, lemon or None"),
        ("plum pear", "unexpected argument 'pear'; see --help"),
        ("--layers 2", "NAME is missing; see --help"),
        ("plum --glaze", "--glaze is not an option; did you mean '--no-glaze'?; see --help"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(words: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Cake, words.split(), program="bake")
    assert str(caught.value) == line


def test_a_required_option_is_named() -> None:
    @dataclasses.dataclass
    class Needy:
        files: tuple[str, ...]

    with pytest.raises(UserError, match=r"^--files is missing; see --help$"):
        parse(Needy, [], program="read")
