"""A round of PPO on openings of fables, in CPU time of one thread: 128 answers, scored by a reward model, 4 updates.

Policy and reward model are GPTs of two layers, 96 wide, with random weights, so that answers are about as long as 32
tokens leave room for. The limit is the updates alone: next-token prediction on as many rows. With the last release of
TRL that has a `PPOTrainer` (1.12, in `trl.experimental.ppo`), it takes rounds of the same size with the same weights,
as GPT-2s. Its values come from a second model, as large as the policy; ours from a head of the policy, as in
`fables_ppo`.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.made import close, make_trainer, shipped, train_macro_batch
from benchmarks.runner import Row, Setup, cpu_seconds, interleave, one_thread
from cleangpt.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from cleangpt.corpora import prepare
from cleangpt.corpora.fable_openings import VOCABULARY, FableOpenings, encoded, tokenizer
from cleangpt.data.dataset import TokenDataset
from cleangpt.environments.config import Reward
from cleangpt.experiment import Experiment
from cleangpt.interchange.export import export
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import NextToken
from cleangpt.objectives.reward_model import HEAD

ANSWERS, PASSES, MINI_BATCHES, LONGEST = 128, 2, 2, 25
TRL_GOAL, TRAINER = 0.5, "trl.experimental.ppo"
MODEL = GPTConfig(vocab_size=VOCABULARY, max_seq_len=32, n_layers=2, n_heads=4, dim=96)


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark; that against TRL only where it is installed with PPO."""
    with one_thread():
        return _run(setup)


def _run(setup: Setup) -> list[Row]:
    rounds = 1 if setup.quick else 5
    answers = 8 if setup.quick else ANSWERS
    base, judge = _models(setup.folder)
    policy = _experiment(base, judge, answers, rounds)
    dataset = prepare(policy.corpus, setup.folder / "data", console=Console(quiet=True)).sources[0].dataset
    trainers = {
        name: make_trainer(dataclasses.replace(policy, objective=objective), dataset, setup.folder / name)
        for name, objective in (("ours", policy.objective), ("updates alone", NextToken()))
    }
    measures: dict[str, Callable[[], float]] = {
        name: lambda trainer=trainer: cpu_seconds(lambda: train_macro_batch(trainer)) / rounds  # type: ignore[misc]
        for name, trainer in trainers.items()
    }
    if importlib.util.find_spec("trl") is not None and importlib.util.find_spec(TRAINER) is not None:
        measures["TRL"] = lambda: trl_round(setup.folder, base, judge, dataset, answers, rounds)
    taken = interleave(measures, setup.repetitions)
    for trainer in trainers.values():
        close(trainer)
    ours = taken.pop("ours")
    what = f"PPO round, {answers} answers: CPU time"
    return [Row(what, "s", ours, name, theirs, TRL_GOAL if name == "TRL" else None) for name, theirs in taken.items()]


def _models(folder: Path) -> tuple[Path, Path]:
    """A random policy and a random reward model, which all sides have."""
    for number, heads in enumerate(((), (HEAD,))):
        torch.manual_seed(number)
        weights = build_model(MODEL, heads).state_dict()
        save_checkpoint(folder / ("judge" if heads else "base"), weights, MODEL, tokenizer(), {})
    return folder / "base", folder / "judge"


def _experiment(base: Path, judge: Path, answers: int, rounds: int) -> Experiment:
    """`fables_ppo` with one reward, that of the model."""
    experiment = shipped(
        "fables_ppo", tracking={"progress": False, "sample_tokens": 0, "score_samples": 0},
        rollouts={"prompts": answers, "passes": PASSES, "rewards": (Reward(name="model"),), "reward_model": str(judge)},
        training={
            "batches_per_macro_batch": PASSES * MINI_BATCHES * rounds, "macro_batches": 1000, "device": "cpu",
            "precision": "fp32",
        },
        optimizer={"lr": 1e-4, "lr_factors": ()},
    )  # fmt: skip
    data = dataclasses.replace(experiment.data, batch_size=answers // MINI_BATCHES)
    corpus = FableOpenings(row=data.seq_len)  # so that next-token prediction has rows as long
    return dataclasses.replace(experiment, corpus=corpus, data=data, init_from=str(base))


def trl_round(folder: Path, base: Path, judge: Path, dataset: TokenDataset, answers: int, rounds: int) -> float:
    """CPU seconds per round of TRL's trainer; its start and the first round do not count."""
    trl, transformers = importlib.import_module(TRAINER), importlib.import_module("transformers")
    datasets = importlib.import_module("datasets")
    for checkpoint in (base, judge):
        if not (folder / f"exported_{checkpoint.name}").is_dir():
            export(load_checkpoint(checkpoint), "hf", folder / f"exported_{checkpoint.name}")
    prompts = [prompt.tolist() for prompt in encoded()[0]]
    rows = [{"input_ids": prompts[number % len(prompts)]} for number in range(answers)]
    ticks: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.process_time())

    arguments = trl.PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=answers // MINI_BATCHES,
        gradient_accumulation_steps=MINI_BATCHES, num_mini_batches=MINI_BATCHES, num_ppo_epochs=PASSES,
        total_episodes=answers * (rounds + 1), response_length=LONGEST, stop_token="eos", temperature=1.0,
        local_rollout_forward_batch_size=answers, kl_coef=0.02, vf_coef=0.1, missing_eos_penalty=3.0,
        learning_rate=1e-4, lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, num_sample_generations=0,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        known = transformers.AutoTokenizer.from_pretrained(folder / "exported_base", padding_side="left")
        known.add_special_tokens({"pad_token": "[PAD]"})
        policy, reference = (
            transformers.AutoModelForCausalLM.from_pretrained(folder / "exported_base") for _ in range(2)
        )
        reward, value = (
            transformers.AutoModelForSequenceClassification.from_pretrained(folder / "exported_judge", num_labels=1)
            for _ in range(2)
        )
        for model in (policy, reference, reward, value):
            model.resize_token_embeddings(len(known))
        data = datasets.Dataset.from_list(rows)
        trainer = trl.PPOTrainer(
            args=arguments, processing_class=known, model=policy, ref_model=reference, reward_model=reward,
            value_model=value, train_dataset=data, eval_dataset=data, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return float(np.diff(ticks).mean())
