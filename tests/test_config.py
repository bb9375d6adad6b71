"""A wrong field is refused in one line that names it, its value and what is allowed; JSON gives back what went in."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from cleangpt.checkpoints.run_folder import experiment_json, kinds
from cleangpt.config import MuonConfig, OptimizerConfig, Schedule, ScheduleConfig
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment, check_experiment
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.validation import from_json, to_json

Build = Callable[..., Experiment]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model__n_heads": 3}, "model.n_heads is 3; allowed: a divisor of model.dim, which is 16"),
        ({"data__seq_len": 99}, "data.seq_len is 99; allowed: at most model.max_seq_len, which is 9"),
        ({"training__accumulation": 5}, "training.accumulation reaches 5 batches a step; allowed: at most "
         "training.batches_per_macro_batch, which is 4"),
        ({"training__micro_batch_size": 3}, "training.micro_batch_size is 3; allowed: a divisor of the 8 samples of a "
         "batch on one device"),
        ({"data__batch_size": "8"}, "data.batch_size is '8'; allowed: a whole number"),
        ({"data__batch_size": True}, "data.batch_size is True; allowed: a whole number"),
        ({"data__batch_size": 0},
         "data.batch_size is 0; allowed: a whole number of 1 or more, at most 1,099,511,627,776"),
        ({"optimizer__lr": -1.0}, "optimizer.lr is -1.0; allowed: 0 or more"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr is nan; allowed: a finite number"),
        ({"optimizer__betas": (0.9, 1.0)}, "optimizer.betas is (0.9, 1.0); allowed: two numbers from 0 to below 1"),
        ({"optimizer__muon": MuonConfig(momentum=1.0)}, "optimizer.muon.momentum is 1.0; allowed: from 0 to below 1"),
        (
            {"optimizer": OptimizerConfig(lr=0.0, muon=MuonConfig(lr=0.1))},
            "optimizer.lr is 0.0; allowed with optimizer.muon.lr: more than 0",
        ),
        (
            {"optimizer__lr_factors": (("head.*", -1.0),)},
            "optimizer.lr_factors is (('head.*', -1.0),); allowed: patterns, each with a number of 0 or more",
        ),
        ({"optimizer__betas": (0.9,)}, "optimizer.betas is (0.9,); allowed: a tuple of a number, a number"),
        ({"training__precision": "fp4"}, "training.precision is 'fp4'; allowed: auto, fp32, tf32, bf16, fp16, fp8"),
        ({"training__device": "gpu"}, "training.device is 'gpu'; allowed: auto, cpu, cuda, cuda:N or mps"),
        ({"training__device": "cuda:x"}, "training.device is 'cuda:x'; allowed: auto, cpu, cuda, cuda:N or mps"),
        ({"name": "a/b"}, "name is 'a/b'; allowed: letters, digits, '-', '_' and '.' within"),
        ({"name": ".."}, "name is '..'; allowed: letters, digits, '-', '_' and '.' within"),
        ({"schedule": ScheduleConfig(lr=Schedule(warmup=2.0))}, "schedule.lr.warmup is 2.0; allowed: from 0 to 1"),
        ({"schedule": ScheduleConfig(lr=Schedule(shape="wsd", warmup=0.5, decay=0.6))},
         "schedule.lr.decay is 0.6; allowed: at most 1 - warmup, which is 0.5"),
        ({"saving": None}, "saving is None; allowed: a SavingConfig"),
    ],
)  # fmt: skip
def test_wrong_fields_and_impossible_combinations_are_refused(tiny: Build, fields: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(tiny(**fields))
    assert str(caught.value) == line


def test_a_batch_that_the_devices_do_not_divide_is_refused(tiny: Build) -> None:
    with pytest.raises(UserError, match=r"data.batch_size is 8; allowed: a multiple of the 3 devices"):
        check_experiment(tiny(), devices=3)


@pytest.mark.parametrize("name", experiments())
def test_every_shipped_experiment_is_sound_and_survives_json(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    check_experiment(experiment)
    assert experiment.name == name
    text = json.dumps(experiment_json(experiment))
    assert from_json(Experiment, json.loads(text), kinds()) == experiment


def test_every_shipped_experiment_spells_out_its_optimizer(tiny: Build) -> None:
    for path in experiments().values():
        text = path.read_text(encoding="utf-8")
        assert all(f"{name}=" in text for name in ("lr", "weight_decay", "betas", "clip_norm", "seq_len", "batch_size"))


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda tree: tree["model"].update(n_layer=3), "model.n_layer is not a field of GPTConfig; did you mean"),
        (lambda tree: tree["model"].update(kind="gpd"), "model is of kind 'gpd', which is not registered here"),
        (lambda tree: tree["data"].pop("seq_len"), "data.seq_len is missing; allowed: a whole number"),
        (lambda tree: tree.update(training=[1]), r"training is \[1\]; allowed: an object"),
        (lambda tree: tree["data"].update(seq_len="9"), "data.seq_len is '9'; allowed: a whole number"),
        (lambda tree: tree["model"].update(kind="adder"), "model is of kind 'adder', which is not registered here"),
    ],
)
def test_damaged_json_is_refused_in_one_line(tiny: Build, harm: Callable[[Any], None], line: str) -> None:
    tree = json.loads(json.dumps(to_json(tiny(), kinds())))
    harm(tree)
    with pytest.raises(UserError, match=line):
        from_json(Experiment, tree, kinds())


def test_every_field_has_a_line_of_help() -> None:
    """Each field's docstring stands under it in the source; --help shows it."""
    import inspect

    from cleangpt import config

    for cls in vars(config).values():
        if dataclasses.is_dataclass(cls) and cls.__module__ == config.__name__:
            lines = inspect.getsource(cls).splitlines()
            for entry in dataclasses.fields(cls):
                index = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{entry.name}:"))
                own_type = dataclasses.is_dataclass(entry.type) or entry.name in ("lr", "weight_decay")
                assert own_type or '"""' in lines[index + 1], f"{cls.__name__}.{entry.name}"
