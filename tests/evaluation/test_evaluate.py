"""Other episodes and another way of acting than in training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cleangpt
from cleangpt.checkpoints.checkpoint import best_checkpoint, load_checkpoint
from cleangpt.checkpoints.run_folder import read_experiment
from cleangpt.commands import main
from cleangpt.config import DataConfig, OptimizerConfig, Source, TrackingConfig, TrainingConfig
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.data.modalities import Modalities
from cleangpt.environments.acting import Acting
from cleangpt.environments.gymnasium import Gymnasium
from cleangpt.evaluation.control import act_otherwise, control_metrics
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.rollouts.simulating import play_control

pytest.importorskip("gymnasium")
CART_POLE = Demonstrations(
    env="CartPole-v1", arguments=(("max_episode_steps", 40),), played=4, row=32, reference_episodes=2,
    scored_episodes=2, modalities=Modalities(bins=2, choices=2, separator="none", vector=4),
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def run(workplace: Path) -> Path:
    """Of an agent that has learned next to nothing."""
    experiment = Experiment(
        name="agent", run_dir="run", corpus=CART_POLE, data=DataConfig(seq_len=32, batch_size=2, val_samples=2),
        model=GatoConfig(n_layers=1, n_heads=2, dim=16, tied=True, n_places=8, vector=4),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(macro_batches=1, batches_per_macro_batch=1, device="cpu"),
        tracking=TrackingConfig(score_samples=0, sample_tokens=0, progress=False),
    )  # fmt: skip
    cleangpt.train(experiment)
    return workplace / "run"


def played(run: Path, episodes: int, acting: Acting) -> dict[str, float]:
    """The metrics of as many episodes, played one after another."""
    corpus = replace(CART_POLE, acting=acting)
    environment = corpus.environment(open_dataset(run, read_experiment(run)).sources[0].dataset)
    assert isinstance(environment, Gymnasium)
    model = load_checkpoint(best_checkpoint(run)).model(CPU)
    return control_metrics({"": [play_control(model, environment, "val", [task], CPU)[0] for task in range(episodes)]})


def test_an_agent_acts_in_more_episodes_and_otherwise_than_in_training(run: Path) -> None:
    chosen = ["--acting", "choices=argmax", "temperature=0.5", "see_actions=false"]
    assert main(["evaluate", "run", "--episodes", "3", *chosen]) == 0
    found = json.loads(Path("run/evaluation.json").read_text())
    expected = played(run, 3, Acting(choices="argmax", temperature=0.5, see_actions=False))
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["acting"] == "choices=argmax, temperature=0.5, see_actions=False"
    assert main(["evaluate", "run"]) == 0
    found, expected = json.loads(Path("run/evaluation.json").read_text()), played(run, 2, Acting())
    assert {name: found[name] for name in expected} == pytest.approx(expected) and "acting" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["temprature=1"], "did you mean '--temperature'?"),
        (["temperature=0"], "--temperature is 0.0; allowed: a number above 0"),
        (["choices=best"], "--choices is 'best'; allowed: sample, argmax"),
        (["temperature"], "--temperature needs a value"),
    ],
)
def test_a_wrong_way_of_acting_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["evaluate", "run", "--acting", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --acting: ") and message in error
    assert not (run / "evaluation.json").exists()


def test_all_tasks_of_a_mixture_act_otherwise() -> None:
    text = ShakespeareChar()
    mixture = Mixture(
        sources=(
            Source(name="a", corpus=CART_POLE), Source(name="b", corpus=replace(CART_POLE, acting=Acting(context=9))),
            Source(name="text", corpus=text),
        )
    )  # fmt: skip
    changed = act_otherwise(mixture, None, {"temperature": 0.5})
    assert isinstance(changed, Mixture)
    a, b, same = (source.corpus for source in changed.sources)
    assert a == replace(CART_POLE, acting=Acting(temperature=0.5)) and same == text
    assert b == replace(CART_POLE, acting=Acting(temperature=0.5, context=9))
