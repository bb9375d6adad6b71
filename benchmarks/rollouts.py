"""A GRPO round on three-digit addition, in CPU time of one thread: 1,024 answers of 5 tokens and 4 updates.

The model is that of `adder_grpo`, 2 layers, 96 wide. The limit is the four updates alone: next-token prediction on as
many rows. With TRL installed, its `GRPOTrainer` has the same prompts, rewards, loss (DAPO's, without a KL term), batch
sizes and weights, as a GPT-2; a round of either side is everything between two rounds. Sampling alone is measured on
the model of the fables: 256 openings of 9 to 13 tokens, as trained models write them.
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
from cleangpt.corpora.fable_openings import VOCABULARY, encoded
from cleangpt.data.dataset import TokenDataset
from cleangpt.environments.exact_answer import ExactAnswer
from cleangpt.experiment import Experiment
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import Sampling
from cleangpt.interchange.export import export
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import NextToken

TRL_GOAL = 1 / 2.5
SAMPLING_GOAL = 1 / 40_000
"""CPU seconds per token."""
UPDATES = 4
LONGEST = 16
"""Tokens that the models read: TRL reads the last token of an answer too."""


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark; that against TRL only where it is installed."""
    with one_thread():
        return _run(setup)


def _run(setup: Setup) -> list[Row]:
    rounds = 1 if setup.quick else 5
    base, dataset = _start(setup)
    policy = _experiment(base, prompts=8 if setup.quick else 128, rounds=rounds)
    trainers = {
        name: make_trainer(dataclasses.replace(policy, objective=objective), dataset, setup.folder / name)
        for name, objective in (("ours", policy.objective), ("updates alone", NextToken()))
    }
    measures: dict[str, Callable[[], float]] = {
        name: lambda trainer=trainer: cpu_seconds(lambda: train_macro_batch(trainer)) / rounds  # type: ignore[misc]
        for name, trainer in trainers.items()
    }
    if importlib.util.find_spec("trl") is not None:
        measures["TRL"] = lambda: trl_round(setup.folder, base, dataset, policy, rounds)
    taken = interleave(measures, setup.repetitions)
    for trainer in trainers.values():
        close(trainer)
    ours = taken.pop("ours")
    what = f"GRPO round, {policy.rollouts.answers:,} answers: CPU time"
    rows = [Row(what, "s", ours, name, theirs, TRL_GOAL if name == "TRL" else None) for name, theirs in taken.items()]
    tokens = [sampling_seconds() for _ in range(setup.repetitions + 1)][1:]
    goal = [SAMPLING_GOAL] * len(tokens)
    return [*rows, Row("sampling fables: CPU time of a token", "s", tokens, "40,000 a second", goal, goal=1.0)]


def sampling_seconds() -> float:
    """CPU seconds per token of 256 openings of fables by a random model, which are ended where trained ones end."""
    torch.manual_seed(0)
    model = build_model(GPTConfig(vocab_size=VOCABULARY, max_seq_len=32, n_layers=2, n_heads=4, dim=96)).eval()
    prompts = [prompt.tolist() for prompt in encoded()[0]]
    engine, sampling = Engine(model, torch.device("cpu"), vocab_size=VOCABULARY, sampled_logprobs=True), Sampling()

    def sample() -> int:
        for row in range(256):
            prompt = prompts[row // 8 % len(prompts)]
            engine.submit(prompt, max_new_tokens=9 + row % 5, sampling=sampling, seed=row)
        return sum(len(completion.ids) for _, completion in engine.completions())

    tokens = sample()
    return cpu_seconds(sample) / tokens


def _start(setup: Setup) -> tuple[Path, TokenDataset]:
    """A random model, which all sides start from, and the problems."""
    experiment, base = shipped("adder_grpo"), setup.folder / "base"
    dataset = prepare(experiment.corpus, setup.folder / "data", console=Console(quiet=True)).sources[0].dataset
    torch.manual_seed(0)
    config = experiment.model.resolved(dataset.vocab_size, LONGEST)
    save_checkpoint(base, build_model(config).state_dict(), config, dataset.tokenizer, {})
    return base, dataset


def _experiment(base: Path, prompts: int, rounds: int) -> Experiment:
    """`adder_grpo` without what TRL does not do here: dynamic sampling, and a measured KL divergence."""
    experiment = shipped(
        "adder_grpo", tracking={"progress": False, "sample_tokens": 0, "score_samples": 0},
        rollouts={"prompts": prompts, "dynamic_sampling": False, "measure_kl": False},
        training={
            "batches_per_macro_batch": UPDATES * rounds, "macro_batches": 1000, "device": "cpu", "precision": "fp32",
        },
        optimizer={"lr": 1e-4}, saving={"best": "highest train_reward"}, model={"max_seq_len": LONGEST},
    )  # fmt: skip
    data = dataclasses.replace(experiment.data, batch_size=experiment.rollouts.answers // UPDATES)
    return dataclasses.replace(experiment, data=data, init_from=str(base))


def trl_round(folder: Path, base: Path, dataset: TokenDataset, policy: Experiment, rounds: int) -> float:
    """CPU seconds per round of TRL's trainer; its start and the first round do not count."""
    trl, transformers = importlib.import_module("trl"), importlib.import_module("transformers")
    datasets = importlib.import_module("datasets")
    if not (folder / "exported").is_dir():
        export(load_checkpoint(base), "hf", folder / "exported")
    environment, decode = ExactAnswer(dataset), dataset.tokenizer.decode
    tasks = [environment.reset("train", task) for task in range(policy.rollouts.prompts * (rounds + 1))]
    rows = [{"prompt": decode(task.tokens), "answer": decode(task.extras["answer"])} for task in tasks]
    size = policy.data.batch_size
    ticks: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.process_time())

    def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(one.strip() == other.strip()) for one, other in zip(completions, answer, strict=True)]

    arguments = trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=size, steps_per_generation=UPDATES,
        num_generations=policy.rollouts.completions, max_completion_length=5, temperature=1.0, beta=0.0,
        loss_type="dapo", epsilon=0.2, epsilon_high=0.28, learning_rate=1e-4, lr_scheduler_type="constant",
        max_steps=UPDATES * (rounds + 1), report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
        disable_tqdm=True, bf16=False, gradient_checkpointing=False, log_completions=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "exported")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder / "exported"), args=arguments,
            reward_funcs=right, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return float(np.diff(ticks[UPDATES - 1 :: UPDATES]).mean())
