"""What the benchmarks train on: synthetic datasets of any length, and trainers of the shipped experiments."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cleangpt.checkpoints.run_folder import open_run
from cleangpt.config import DataConfig, ScheduleConfig
from cleangpt.data.dataset import DATASET, TokenDataset
from cleangpt.data.mixing import MixedDataset, MixtureSource
from cleangpt.data.tokenizers import CharTokenizer
from cleangpt.data.writer import SHARD_TOKENS, DatasetWriter
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import find_experiment, load_experiment
from cleangpt.files import read_json, write_json
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.build import build_trainer
from cleangpt.training.launch import check
from cleangpt.training.resolve import resolve
from cleangpt.training.trainer import Trainer

WRITTEN = 1_000_000
"""Training tokens that are really written; the rest of a larger dataset is a hole in its sparse files."""


def make_store(folder: Path, tokens: int, vocab_size: int = 65, val_tokens: int = 10_000) -> TokenDataset:
    """Random tokens of `vocab_size` characters: `tokens` to train on, some of them 0, and `val_tokens` to validate."""
    writer = DatasetWriter(folder, {"kind": "made"}, CharTokenizer(characters(vocab_size)))
    random = np.random.default_rng(0)
    for split, count in (("train", min(tokens, WRITTEN)), ("val", val_tokens)):
        ids = random.integers(vocab_size, size=count)
        writer.append(split, ids, np.array([count]), text_bytes=count)
    store = writer.finish(lambda _: "made for a benchmark\n")
    return _stretch(folder, tokens) if tokens > WRITTEN else store


def characters(count: int) -> str:
    """`count` characters; beyond some thousands from planes of Unicode without surrogates."""
    first = 48 if count < 10_000 else 2**16
    return "".join(map(chr, range(first, first + count)))


def _stretch(folder: Path, tokens: int) -> TokenDataset:
    """Extends the training split to `tokens` with zeros, which take no disk space where sparse files are supported."""
    facts = read_json(folder / DATASET)
    shards = []
    for number, start in enumerate(range(0, tokens, SHARD_TOKENS)):
        name, length = f"train_{number:05d}.bin", min(SHARD_TOKENS, tokens - start)
        with (folder / name).open("ab") as file:
            file.truncate(length * np.dtype(facts["dtype"]).itemsize)
        shards.append({"file": name, "tokens": length})
    facts["splits"]["train"] |= {"tokens": tokens, "shards": shards, "text_bytes": tokens}
    write_json(folder / DATASET, facts)
    return TokenDataset(folder)


def shipped(name: str, data: DataConfig | None = None, **fields: Any) -> Experiment:
    """A shipped experiment with `fields` such as ``training={"precision": "bf16"}`` changed.

    Its learning rate is constant, and it neither samples text nor shows progress, which are not part of a step.
    """
    changed = {"tracking": {"progress": False, "sample_tokens": 0}, **fields}
    experiment = load_experiment(find_experiment(name))
    for part, entries in changed.items():
        part_changed = dataclasses.replace(getattr(experiment, part), **entries)
        experiment = dataclasses.replace(experiment, **{part: part_changed})
    return dataclasses.replace(experiment, data=data or experiment.data, schedule=ScheduleConfig())


def make_trainer(experiment: Experiment, store: TokenDataset, run: Path) -> Trainer:
    """A trainer of `experiment` on the dataset `store` instead of its corpus, with its run in the folder `run`."""
    check(experiment)
    experiment = resolve(dataclasses.replace(experiment, run_dir=str(run)), store.vocab_size)
    dataset = MixedDataset([MixtureSource(store)])
    return build_trainer(experiment, open_run(experiment, None, []), dataset, ProgressBar(run, progress=False))


def flops_of_step(trainer: Trainer) -> int:
    """FLOPs of a step of one batch."""
    throughput = trainer.recorder.throughput
    return throughput.flops_per_token * throughput.seq_len * trainer.length.batch_size


def train_macro_batch(trainer: Trainer) -> tuple[float, float]:
    """Trains a macro-batch; returns the seconds per step and those spent waiting for data, as the trainer counts."""
    seconds, waited, steps = trainer.meter.seconds, trainer.meter.waited, trainer.meter.steps
    trainer.train_macro_batch()
    trainer.position.macro_batch += 1
    made = trainer.meter.steps - steps
    return (trainer.meter.seconds - seconds) / made, (trainer.meter.waited - waited) / made


def close(trainer: Trainer) -> None:
    """Stops a trainer's background threads."""
    trainer.source.close()
    trainer.recorder.trackers.close("finished")
