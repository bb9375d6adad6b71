"""Rollouts are exact: the same whatever the chunks, processes and micro-batches, and resumed within a round."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.experiment import Experiment
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.ppo import PPO
from cleangpt.rollouts.source import RolloutSource
from cleangpt.tracking.metrics import read_metrics, read_steps
from cleangpt.training.trainer import Trainer
from tests.conftest import stop_after
from tests.faults._runs import differing
from tests.forked import run_together

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]
TIMED = ("per_second", "time", "wait", "memory", "mfu")


def final(run: str) -> dict[str, Any]:
    """What training made; without times and what is kept for show."""
    state = load_snapshot(list_snapshots(Path(run) / "snapshots")[0])
    del state["meter"], state["position"]["time_trained"], state["checkpoints"], state["trackers"]
    del state["source"]["rounds"]
    return state


def recorded(run: str) -> list[dict[str, Any]]:
    """The metrics of all macro-batches and steps, without times."""
    rows = [*read_metrics(Path(run)), *read_steps(Path(run))]
    return [{name: value for name, value in row.items() if not any(word in name for word in TIMED)} for row in rows]


def answers_of(run: str) -> list[str]:
    """The lines of answers.jsonl."""
    file = Path(run) / "answers.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def rounds_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Collects the columns of every round that the trainer begins from now on."""
    source, found = trainer.source, list[dict[str, Tensor]]()
    assert isinstance(source, RolloutSource)
    begin = source._begin_round

    def begin_round(number: int) -> None:
        begin(number)
        found.append({name: column.clone() for name, column in source.rows.items()})

    source._begin_round = begin_round  # type: ignore[method-assign]
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"rollouts__dynamic_sampling": True, "rollouts__save_answers": True},
    "reference": {"objective": GRPO(kl_coef=0.1)},
    "ppo": {
        "objective": PPO(kl_coef=0.1, kl_target=0.01, kl_horizon=100), "rollouts__passes": 2,
        "training__batches_per_macro_batch": 8,
    },
}  # fmt: skip


@pytest.mark.default(1)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_after_every_step_ends_with_the_same_bits(policy: Build, trainer: Open, variant: str) -> None:
    """Within rounds and between them; every step but the first follows a resume."""
    trainer(policy(run_dir="one", tracking__every=1, **VARIANTS[variant])).train()
    status, times = "interrupted", 0
    while status == "interrupted":
        broken = trainer(policy(run_dir="two", tracking__every=1, **VARIANTS[variant]))
        stop_after(broken, 1)
        status, times = broken.train(), times + 1
    assert status == "finished" and times >= 12
    assert differing(final("one"), final("two")) == ""
    assert recorded("one") == recorded("two") and answers_of("one") == answers_of("two")
    assert len(answers_of("one")) == (3 * 32 if variant == "grpo" else 0)


@pytest.mark.slow
def test_every_answer_is_in_the_file_once_also_after_a_crash(policy: Build, trainer: Open) -> None:
    """The crash is within the second round, whose answers are in the file, and before its snapshot; then the start of
    the third is torn."""
    experiment = partial(policy, rollouts__save_answers=True)
    trainer(experiment(run_dir="one")).train()
    crashing = trainer(experiment(run_dir="two"))
    fetch, fetched = crashing.source.next, list[Any]()

    def fails() -> Any:
        assert len(fetched) < 6, "a crash"
        fetched.append(fetch())
        return fetched[-1]

    crashing.source.next = fails  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="a crash"):
        crashing.train()
    assert len(answers_of("two")) == 2 * 32
    with Path("two/answers.jsonl").open("a") as file:
        file.write('{"step": 9, "id"')
    trainer(experiment(run_dir="two")).train()
    assert answers_of("one") == answers_of("two")
    first = json.loads(answers_of("one")[0])
    assert (first["step"], first["id"], first["reward"]) == (1, 0, first["reward/low"])
    assert first["completion"] and "+" in first["prompt"] and first["tokens"] == len(first["completion"])
    assert [json.loads(line)["step"] for line in answers_of("one")[::32]] == [1, 5, 9]


def test_answers_do_not_depend_on_the_chunks_they_are_generated_in(policy: Build, trainer: Open) -> None:
    found = []
    for size in (1, 3, 32):
        opened = trainer(policy(run_dir=str(size), rollouts__micro_batch_size=size, training__macro_batches=1))
        rounds = rounds_of(opened)
        opened.train()
        found.append(rounds[0])
    for other in found[1:]:
        assert torch.equal(found[0]["tokens"], other["tokens"])
        torch.testing.assert_close(found[0]["old_logprobs"], other["old_logprobs"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_update_does_not_depend_on_the_micro_batch_of_training(policy: Build, trainer: Open) -> None:
    weights = []
    for size in (1, 8):
        opened = trainer(policy(run_dir=str(size), training__micro_batch_size=size))
        opened.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in opened.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


@pytest.mark.default(1)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_update_the_trainer_agrees_with_the_sampler_on_every_token(
    policy: Build, trainer: Open, temperature: float
) -> None:
    """At any temperature, and where tokens pad the vocabulary: the tokenizer has 13, the embedding 16."""
    trainer(policy(run_dir="run", rollouts__temperature=temperature, tracking__every=1)).train()
    steps = read_steps(Path("run"))
    first = steps[0]
    assert 0 < first["logprob_gap_max"] < 1e-5 and first["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert all(step["logprob_gap_max"] < 1e-5 for step in steps)
    assert max(step["ratio_max"] for step in steps) > 1.001, "later steps are further away"


def test_a_round_is_used_up_in_passes_of_different_orders(policy: Build, trainer: Open) -> None:
    opened = trainer(policy(rollouts__passes=2, training__batches_per_macro_batch=8))
    batches = [opened.source.next() for _ in range(8)]
    rows = [[tuple(row) for row in batch.inputs["tokens"].tolist()] for batch in batches]
    one, two = ([row for batch in part for row in batch] for part in (rows[:4], rows[4:]))
    assert sorted(one) == sorted(two) and one != two
    assert [float(batch.extras["fresh"].max()) for batch in batches] == [1, 0, 0, 0, 0, 0, 0, 0]


def test_the_answers_to_a_prompt_are_in_one_batch(policy: Build, trainer: Open) -> None:
    opened = trainer(policy(rollouts__passes=2, training__batches_per_macro_batch=8))
    for _ in range(8):
        prompts = Counter(tuple(row[:4]) for row in opened.source.next().inputs["tokens"].tolist())
        assert sum(prompts.values()) == 8 and all(count % 4 == 0 for count in prompts.values()), "groups of 4 are whole"


# Several processes ----------------------------------------------------------------------------------------------------
EXPERIMENT = """
import os
import signal
import zlib
from cleangpt.config import *
from cleangpt.environments.config import Reward, RolloutConfig
from cleangpt.environments.rewards import REWARDS
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives.grpo import GRPO
from cleangpt.training.trainer import Trainer

plain_step = Trainer.step

def step(trainer):
    plain_step(trainer)
    if trainer.position.step == int(os.environ.get("STOP_AFTER", -1)):
        signal.raise_signal(signal.SIGTERM)

Trainer.step = step

def checksum(prompt, answer, episode):
    return zlib.crc32(f"{prompt} {answer}".encode()) % 1000 / 1000

REWARDS["checksum"] = checksum

experiment = Experiment(
    name="own",
    corpus=Adder(digits=2, train_samples=90, val_samples=40, test_samples=30),
    data=DataConfig(seq_len=9, batch_size=12),
    model=GPTConfig(max_seq_len=9, n_layers=2, n_heads=2, dim=16),
    objective=GRPO(norm="token", kl_coef=0.01),
    optimizer=OptimizerConfig(lr=3e-3),
    rollouts=RolloutConfig(prompts=12, completions=4, micro_batch_size=4, rewards=(Reward(name="checksum"),)),
    training=TrainingConfig(macro_batches=4, batches_per_macro_batch=4, device="cpu", threads=1),
    saving=SavingConfig(best="highest exact_match", keep_snapshots=9),
    tracking=TrackingConfig(progress=False, score_samples=10),
)
"""
"""A reward that any other token would change; the run is interrupted after the step that STOP_AFTER names."""


def launch(processes: int, *words: str, **environment: str) -> None:
    Path("own.py").write_text(EXPERIMENT)
    outcome = run_together(processes, *words, **environment)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


def same_rollouts(one: str, two: str) -> None:
    """Every answer is the same, and the weights, up to rounding."""
    for ours, theirs in zip(read_metrics(Path(one)), read_metrics(Path(two)), strict=True):
        assert ours["train_reward"] == pytest.approx(theirs["train_reward"], abs=1e-12)
        assert ours["train_entropy"] == pytest.approx(theirs["train_entropy"], abs=1e-4)
        assert ours["train_logprob_gap_max"] < 1e-5 > theirs["train_logprob_gap_max"]
    ours, theirs = final(one)["model"], final(two)["model"]
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy"), [pytest.param(2, "ddp", marks=pytest.mark.torture), (2, "fsdp"), (3, "ddp")]
)
def test_several_processes_draw_the_same_answers_as_one(workplace: Path, processes: int, strategy: str) -> None:
    launch(1, "train", "own.py", "--run-dir", "one")
    launch(processes, "train", "own.py", "--run-dir", "two", "--parallel.strategy", strategy)
    same_rollouts("one", "two")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.torture), "fsdp"])
def test_two_processes_interrupted_within_a_round_end_with_the_same_bits(workplace: Path, strategy: str) -> None:
    words = ["--parallel.strategy", strategy]
    launch(2, "train", "own.py", "--run-dir", "one", *words)
    launch(2, "train", "own.py", "--run-dir", "two", *words, STOP_AFTER="6")
    assert list_snapshots(Path("two/snapshots"))[0].name == "mb000001_b00002"
    launch(2, "resume", "two")
    assert differing(final("one"), final("two")) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.torture)])
def test_a_round_begun_on_some_processes_is_finished_by_others(workplace: Path, before: int, after: int) -> None:
    launch(1, "train", "own.py", "--run-dir", "one")
    launch(before, "train", "own.py", "--run-dir", "two", STOP_AFTER="6")
    launch(after, "resume", "two")
    same_rollouts("one", "two")
