"""A DPO step: 64 pairs of openings of fables on a GPT of two layers, 96 wide, in CPU time of one thread.

The limit is a step of next-token prediction on the same rows, which reads the same tokens. With TRL installed, its
`DPOTrainer` takes steps of the same size on the same pairs and an equal GPT-2, with reference log-probabilities that it
has computed beforehand, as ours are; a step of either side is everything between two updates, loading included.
"""

import contextlib
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

from benchmarks.made import close, make_trainer, train_macro_batch
from benchmarks.runner import Row, Setup, cpu_seconds, interleave, one_thread
from cleangpt.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from cleangpt.config import DataConfig, OptimizerConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora import prepare
from cleangpt.corpora.fable_openings import VOCABULARY, continuation, tokenizer
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.data.mixing import MixedDataset
from cleangpt.environments.fables import prompts
from cleangpt.evaluation.reference import Reference, add_reference
from cleangpt.experiment import Experiment
from cleangpt.interchange.export import export
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import DPO, NextToken, Objective

PAIRS = 64
TRL_GOAL = 0.5
BETA, LR = 0.5, 1e-4
MODEL = GPTConfig(vocab_size=VOCABULARY, max_seq_len=32, n_layers=2, n_heads=4, dim=96)


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark; those against TRL only where it is installed."""
    with one_thread():
        return _run(setup)


def _run(setup: Setup) -> list[Row]:
    steps = 2 if setup.quick else 20
    dataset, base = _data(setup)
    trainers = {
        name: make_trainer(_experiment(objective, base, steps), dataset.sources[0].dataset, setup.folder / name)
        for name, objective in (("ours", DPO(beta=BETA)), ("next token", NextToken()))
    }
    measures: dict[str, Callable[[], float]] = {
        name: lambda trainer=trainer: cpu_seconds(lambda: train_macro_batch(trainer)) / steps  # type: ignore[misc]
        for name, trainer in trainers.items()
    }
    if importlib.util.find_spec("trl") is not None:
        measures["TRL"] = lambda: trl_step(setup.folder, base, steps)
    taken = interleave(measures, setup.repetitions)
    for trainer in trainers.values():
        close(trainer)
    ours = taken.pop("ours")
    goals = {"TRL": TRL_GOAL}
    what = f"DPO, {PAIRS} pairs: CPU time of a step"
    return [Row(what, "s", ours, name, theirs, goals.get(name)) for name, theirs in taken.items()]


def _data(setup: Setup) -> tuple[MixedDataset, Path]:
    """Pairs with the log-probabilities of a random model, which both sides start from."""
    base = setup.folder / "base"
    torch.manual_seed(0)
    save_checkpoint(base, build_model(MODEL).state_dict(), MODEL, tokenizer(), {})
    dataset = prepare(_corpus(), setup.folder / "data", console=Console(quiet=True))
    add_reference(dataset, Reference(str(base), "fp32", torch.device("cpu")), None)
    return dataset, base


def _corpus() -> FablePreferences:
    return FablePreferences(train_pairs=2000, val_pairs=10)


def _experiment(objective: Objective, base: Path, steps: int) -> Experiment:
    return Experiment(
        name="preferences", corpus=_corpus(), data=DataConfig(seq_len=_corpus().row, batch_size=2 * PAIRS),
        model=MODEL, objective=objective, optimizer=OptimizerConfig(lr=LR, weight_decay=0.0), init_from=str(base),
        training=TrainingConfig(macro_batches=1000, batches_per_macro_batch=steps, device="cpu", precision="fp32"),
        tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
    )  # fmt: skip


def trl_step(folder: Path, base: Path, steps: int) -> float:
    """CPU seconds per step of TRL's trainer; its start, tokenization and the first step do not count."""
    trl, transformers = importlib.import_module("trl"), importlib.import_module("transformers")
    datasets = importlib.import_module("datasets")
    exported = _exported(folder, base)
    pairs = [{"prompt": prompts()[prompt], "chosen": continuation(better), "rejected": continuation(worse)}
             for (prompt, better, worse), _ in zip(_corpus().pairs(), range(2000), strict=False)]  # fmt: skip
    ticks: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.process_time())

    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PAIRS, max_steps=steps + 1, beta=BETA,
        learning_rate=LR, lr_scheduler_type="constant", precompute_ref_log_probs=True, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        precompute_ref_batch_size=512,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = trl.DPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(exported), args=arguments, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=transformers.AutoTokenizer.from_pretrained(exported),
        )  # fmt: skip
        trainer.train()
    return float(np.diff(ticks).mean())


def _exported(folder: Path, base: Path) -> Path:
    """The same model in Hugging Face's form."""
    if not (folder / "exported").is_dir():
        export(load_checkpoint(base), "hf", folder / "exported")
    return folder / "exported"
