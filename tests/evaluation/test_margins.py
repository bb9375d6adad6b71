"""Margins pair by pair are those whose mean and sign the objective logs."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cleangpt.checkpoints.checkpoint import best_checkpoint, load_checkpoint
from cleangpt.checkpoints.run_folder import read_experiment
from cleangpt.config import DataConfig, OptimizerConfig, SavingConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.data.mixing import split_samples
from cleangpt.environments.config import RolloutConfig
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.evaluation.evaluate import evaluate_run
from cleangpt.evaluation.margins import margins
from cleangpt.experiment import Experiment
from cleangpt.files import read_json
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import DPO, ORPO, Objective, RewardModel
from cleangpt.objectives.pairs import PairObjective
from cleangpt.objectives.reinforce import Reinforce
from cleangpt.tracking.report import write_report
from cleangpt.training.launch import train

CPU = torch.device("cpu")
PAIRS = FablePreferences(train_pairs=40, val_pairs=21)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [RewardModel(), ORPO(), DPO(sft_weight=0.5)], ids=["reward model", "ORPO", "DPO"])
def test_the_histogram_counts_the_margins_of_the_pairs(workplace: Path, objective: PairObjective) -> None:
    base = None if not objective.reads & {"reference_logprobs"} else "base"
    if base is not None:
        trained("base", RewardModel(), None)
    run = trained("run", objective, base)
    found = evaluate_run(run, None, "val", CPU)
    dataset = open_dataset(run, read_experiment(run))
    samples = split_samples(dataset, "val", PAIRS.row).values()
    values = margins(load_checkpoint(best_checkpoint(run)).model(CPU), objective, samples, CPU, nullcontext())
    assert len(values) == 21 and np.mean(values) == pytest.approx(found["margin"], abs=1e-6)
    assert np.mean(np.greater(values, 0)) == pytest.approx(found["accuracy"])
    drawn = read_json(run / "margins.json")
    assert sum(drawn["counts"]) == 21 and drawn["edges"][0] == min(values) and drawn["edges"][-1] == max(values)
    assert "Margins" in write_report([run]).read_text() and (run / "plots" / "margins.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_policy_is_evaluated_without_pairs_or_rows_of_its_length(workplace: Path) -> None:
    """Its answers may be longer than the rows of its corpus, of which it reads the prompts."""
    policy = tiny("run", Reinforce(), None)
    corpus = FableOpenings(train_sentences=64, val_sentences=8)
    rollouts, saving = RolloutConfig(prompts=8, completions=1), SavingConfig(best="highest train_reward")
    data = DataConfig(seq_len=31, batch_size=8)
    train(replace(policy, corpus=corpus, data=data, rollouts=rollouts, saving=saving))
    found = evaluate_run(Path("run"), None, "val", CPU)
    assert "grammatical" in found and not Path("run/margins.json").exists(), found


def trained(name: str, objective: Objective, base: str | None) -> Path:
    train(tiny(name, objective, base))
    return Path(name)


def tiny(name: str, objective: Objective, base: str | None) -> Experiment:
    return Experiment(
        name=name, run_dir=name, corpus=PAIRS, data=DataConfig(seq_len=PAIRS.row, batch_size=16), objective=objective,
        model=GPTConfig(max_seq_len=32, n_layers=1, n_heads=2, dim=16), optimizer=OptimizerConfig(lr=1e-2),
        training=TrainingConfig(macro_batches=1, batches_per_macro_batch=4, device="cpu"), init_from=base,
        tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=6),
    )  # fmt: skip
