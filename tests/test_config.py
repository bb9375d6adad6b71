"""What the configurations of the shipped experiments and their fields must be."""

import dataclasses
import inspect
import json

import pytest

from cleangpt import config
from cleangpt.checkpoints.run_folder import experiment_json, kinds
from cleangpt.config import LENGTHS, TrainingConfig
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.models.llama import LlamaConfig
from cleangpt.training.launch import check
from cleangpt.validation import from_json


@pytest.mark.parametrize("name", experiments())
def test_every_shipped_experiment_is_sound_and_survives_json(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    check(experiment)
    assert experiment.name == name
    text = json.dumps(experiment_json(experiment))
    assert from_json(Experiment, json.loads(text), kinds()) == experiment


def test_every_shipped_experiment_spells_out_its_optimizer() -> None:
    for path in experiments().values():
        text = path.read_text(encoding="utf-8")
        assert all(f"{name}=" in text for name in ("lr", "weight_decay", "betas", "clip_norm", "seq_len", "batch_size"))


def test_every_field_has_a_line_of_help() -> None:
    """Each field's docstring stands under it in the source; --help shows it."""
    for cls in vars(config).values():
        if dataclasses.is_dataclass(cls) and cls.__module__ == config.__name__:
            lines = inspect.getsource(cls).splitlines()
            for entry in dataclasses.fields(cls):
                index = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{entry.name}:"))
                own_type = dataclasses.is_dataclass(entry.type) or entry.name in ("lr", "weight_decay")
                assert own_type or '"""' in lines[index + 1], f"{cls.__name__}.{entry.name}"


@pytest.mark.parametrize(
    ("lengths", "found"),
    [({}, "none of them"), ({"steps": 3, "epochs": 1.5}, "training.steps 3 and training.epochs 1.5")],
)
def test_a_run_has_exactly_one_length(lengths: dict[str, float], found: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainingConfig(batches_per_macro_batch=4, **lengths)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"the run's length is {found}; allowed: one of training.macro_batches, training.steps, training.tokens, "
        "training.epochs"
    )
    assert len(LENGTHS) == 4


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"dim": 96}, 256),
        ({"dim": 100}, 320),
        ({"dim": 4096}, 10944),
        ({"dim": 96, "activation": "relu2"}, 384),
        ({"dim": 96, "hidden_dim": 7}, 7),
    ],
)
def test_the_mlp_of_llama_has_a_width_by_default(fields: dict[str, int], width: int) -> None:
    """8/3 dim rounded up to a multiple of 64 (Llama 7B: 11,008, to one of 256); 4 dim where there is no gate."""
    model = LlamaConfig(n_layers=1, n_heads=2, **fields)  # type: ignore[arg-type]
    assert model.mlp_size == model.resolved(13, 9).hidden_dim == width  # type: ignore[attr-defined]


def test_a_model_reads_as_many_tokens_as_a_sample_has_unless_it_says_more() -> None:
    assert LlamaConfig(n_layers=1, n_heads=2, dim=8).resolved(13, 9).max_seq_len == 9
    assert LlamaConfig(n_layers=1, n_heads=2, dim=8, max_seq_len=20).resolved(13, 9).max_seq_len == 20
