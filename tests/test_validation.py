"""A dataclass refuses a wrong field when it is made, in one line with its value and what is allowed; JSON gives back
what went in."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from cleangpt.checkpoints.run_folder import kinds
from cleangpt.config import (
    DataConfig,
    LoRAConfig,
    MuonConfig,
    OptimizerConfig,
    Schedule,
    TrainingConfig,
)
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig
from cleangpt.validation import Bounds, Checked, Pattern, describe, fits, from_json, to_json

Build = Callable[..., Experiment]
TRAINING = TrainingConfig(macro_batches=1, batches_per_macro_batch=1)


@pytest.mark.parametrize(
    ("hint", "allowed", "refused", "words"),
    [
        (int, [0, -3], [1.0, True, "1", None], "a whole number"),
        (float, [0, 1.5, 10**400], [math.nan, math.inf, True, "1"], "a number"),
        (int | None, [None, 1], ["1"], "a whole number or None"),
        (Literal["a", 1], ["a", 1], ["1", True, 1.0], "a, 1"),
        (Annotated[int, Bounds(1, 4096)], [1, 4096], [0, 4097, 1.5], "a whole number of 1 or more, at most 4,096"),
        (Annotated[float, Bounds(above=0, most=1)], [1e-9, 1], [0, 1.01], "a number above 0, at most 1"),
        (Annotated[float, Bounds(0, below=1)], [0, 0.99], [-0.1, 1], "a number of 0 or more, below 1"),
        (Annotated[int, Bounds(2, even=True)], [2, 8], [0, 3], "an even number of 2 or more"),
        (Annotated[str, Pattern("a+", "letters a")], ["a", "aaa"], ["", "ab", 3], "letters a"),
        (Annotated[int, Bounds(1)] | None, [None, 2], [0], "a whole number of 1 or more or None"),
        (tuple[str, int], [("a", 1)], [("a",), ("a", "b"), ["a", 1]], "a tuple of text, a whole number"),
        (tuple[Annotated[int, Bounds(1)], ...], [(), (1, 2)], [(1, 0)], "a tuple of a whole number of 1 or more, …"),
    ],
)
def test_an_annotation_says_which_values_fit(hint: Any, allowed: list[Any], refused: list[Any], words: str) -> None:
    assert all(fits(value, hint) for value in allowed)
    assert not any(fits(value, hint) for value in refused)
    assert describe(hint) == words


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: OptimizerConfig(lr=-1.0), "optimizer.lr is -1.0; allowed: a number of 0 or more"),
        (lambda: OptimizerConfig(lr=math.nan), "optimizer.lr is nan; allowed: a finite number"),
        (lambda: OptimizerConfig(lr="fast"), "optimizer.lr is 'fast'; allowed: a number of 0 or more"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(lr=0.1, betas=(0.9, 1.0)), "optimizer.betas is (0.9, 1.0); allowed: a tuple of a "
         "number of 0 or more, below 1, a number of 0 or more, below 1"),
        (lambda: MuonConfig(momentum=1.0), "optimizer.muon.momentum is 1.0; allowed: a number of 0 or more, below 1"),
        (lambda: LoRAConfig(rank=0),
         "fine_tuning.lora.rank is 0; allowed: a whole number of 1 or more, at most 1,099,511,627,776 or None"),
        (lambda: Schedule(warmup=2.0), "schedule.warmup is 2.0; allowed: a number of 0 or more, at most 1"),
        (lambda: replace(TRAINING, device="gpu"), "training.device is 'gpu'; allowed: auto, cpu, cuda, cuda:N or mps"),
        (lambda: GPTConfig(n_layers=0, n_heads=1, dim=4),
         "model.n_layers is 0; allowed: a whole number of 1 or more, at most 4,096"),
        (lambda: GPTConfig(n_layers=1, n_heads=3, dim=4),
         "model.n_heads is 3; allowed: a divisor of model.dim, which is 4"),
        (lambda: replace(DataConfig(seq_len=1, batch_size=1), batch_size=0),
         "data.batch_size is 0; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
    ],
)  # fmt: skip
def test_a_dataclass_checks_itself_when_it_is_made(make: Callable[[], Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == line


def test_a_dataclass_of_ones_own_is_checked_with_the_name_of_its_section() -> None:
    @dataclass(frozen=True)
    class Glow(Checked, section="model.glow"):
        strength: Annotated[float, Bounds(0, 2)] = 1.0

    assert Glow(2).strength == 2
    with pytest.raises(UserError, match=r"^model\.glow\.strength is 3; allowed: a number of 0 or more, at most 2$"):
        Glow(3)


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda tree: tree["model"].update(n_layer=3), "model.n_layer is not a field of GPTConfig; did you mean"),
        (lambda tree: tree["model"].update(kind="gpd"), "model is of kind 'gpd', which is not registered here"),
        (lambda tree: tree["data"].pop("seq_len"), "data.seq_len is missing; allowed: a whole number"),
        (lambda tree: tree.update(training=[1]), r"training is \[1\]; allowed: an object"),
        (lambda tree: tree["data"].update(seq_len="9"), "data.seq_len is '9'; allowed: a whole number"),
        (lambda tree: tree["model"].update(kind="adder"), "model is of kind 'adder', which is not registered here"),
        (lambda tree: tree.update(objective={}), "objective.kind is missing; allowed: dpo, "),
        (lambda tree: tree["model"].pop("kind"), "model.kind is missing; allowed: "),
        (lambda tree: tree["corpus"].pop("kind"), "corpus.kind is missing; allowed: "),
        (lambda tree: tree["schedule"]["weight_decay"].update(warmup=7), "schedule.weight_decay.warmup is 7; allowed"),
    ],
)
def test_damaged_json_is_refused_in_one_line_with_the_path_of_the_field(
    tiny: Build, harm: Callable[[Any], None], line: str
) -> None:
    tree = json.loads(json.dumps(to_json(tiny(), kinds())))
    assert from_json(Experiment, tree, kinds()) == tiny()
    harm(tree)
    with pytest.raises(UserError, match=line):
        from_json(Experiment, tree, kinds())
