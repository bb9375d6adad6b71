"""The reference model's log-probabilities of a dataset: computed once, and kept beside it as one more column.

    data/NAME.reference-1a2b3c4d/reference.json                   what they were computed from, with its checksums
    data/NAME.reference-1a2b3c4d/train_00000.reference_logprobs   float32, one per token, as the shards of the dataset

The reference is the model that training starts from, `init_from`. So there is never a second model in memory, and a
resumed run, whose `init_from` may have changed since, reads the same numbers.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.checkpoints.run_folder import STORES
from cleangpt.data.columns import Column
from cleangpt.data.dataset import DATASET, TOKENIZER, Split, TokenDataset
from cleangpt.data.loader import Samples
from cleangpt.data.mixing import MixedDataset
from cleangpt.data.tokenizers import same_tokens
from cleangpt.distributed.device import autocast, compute_dtype
from cleangpt.errors import UserError, parsing
from cleangpt.files import PARTIAL, commit_folder, read_json, safe_name, sha256, write_json
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models.head import TokenScores
from cleangpt.objectives.pairs import REFERENCE

FACTS = "reference.json"
COLUMN = Column(dtype="float32", role="extra")
TOKENS = 2**14
"""Tokens in one forward pass."""


@dataclass(frozen=True)
class Reference:
    """The model whose log-probabilities are wanted, and how it computes them."""

    source: str
    """As in `Experiment.init_from`."""
    precision: str
    """As in `TrainingConfig.precision`."""
    device: torch.device


def add_reference(dataset: MixedDataset, reference: Reference | None, run: Path | None) -> None:
    """Adds the column `reference_logprobs` to every source of a dataset; computes what there is not yet.

    Args:
        dataset: with rows of one length.
        reference: None: it must have been computed.
        run: a run that may have begun, which has recorded the columns that it reads; None: a new run.

    Raises:
        UserError: there is no reference, or what is kept was computed from other weights or another dataset.
    """
    recorded = _recorded(run) if run is not None else {}
    checkpoint, digest = None, ""
    for source in dataset.sources:
        part = source.dataset
        if REFERENCE in part.columns:
            continue
        folder = recorded.get(source.name)
        if folder is None or not (folder / FACTS).is_file():
            if reference is None:
                raise UserError(
                    f"{folder or part.folder}: no reference log-probabilities; they are computed in training"
                )
            if checkpoint is None:
                checkpoint = open_checkpoint(reference.source)
                tokens = checkpoint.tokenizer.vocab_size  # over which probabilities are normalised
                digest = hashlib.sha256(f"{checkpoint.digest()} {reference.precision} {tokens}".encode()).hexdigest()
            found = part.folder.with_name(f"{part.folder.name}.reference-{digest[:8]}")
            if folder not in (None, found):
                raise UserError(
                    f"{folder}, with the reference log-probabilities of this run, is missing, and {reference.source} "
                    "now has other weights; start another run"
                )
            folder = found
            if not (folder / FACTS).is_file():
                _compute(checkpoint, digest, part, folder, reference)
        attach(part, folder, digest)


def attach(dataset: TokenDataset, folder: Path, digest: str = "") -> None:
    """Opens the column kept in `folder`, if it is of this dataset, and of the weights with this digest (empty: any).

    Raises:
        UserError: it is not.
    """
    facts = read_json(folder / FACTS)
    with parsing(folder / FACTS):
        for what, there, here in (("dataset", facts["dataset"], _sums(dataset)), ("weights", facts["weights"], digest)):
            if here and there != here:
                raise UserError(f"{folder} was computed from another {what}; remove it, and it is computed again")
        for name, split in dataset.splits.items():
            split.add_column(
                REFERENCE, COLUMN, [folder / safe_name(file, folder / FACTS) for file in facts["files"][name]]
            )
        dataset.columns[REFERENCE] = COLUMN
        dataset.description["sha256"] |= {
            f"../{folder.name}/{file}": digest for file, digest in facts["sha256"].items()
        }


def _recorded(run: Path) -> dict[str, Path]:
    """The folders of the columns that a run has read, by source."""
    stores = read_json(run / STORES) if (run / STORES).is_file() else {}
    found = {}
    with parsing(run / STORES):
        for name, facts in stores.items():
            for file in facts["sha256"]:
                if file.endswith(f".{REFERENCE}"):
                    found[name] = Path(facts["folder"]).parent / Path(file).parent.name
    return found


def _sums(dataset: TokenDataset) -> dict[str, str]:
    """Checksums of the dataset itself, without columns kept elsewhere."""
    own = {name: digest for name, digest in dataset.description["sha256"].items() if not name.startswith("../")}
    return own | {TOKENIZER: sha256(dataset.folder / TOKENIZER)}


def _compute(checkpoint: Checkpoint, digest: str, dataset: TokenDataset, folder: Path, reference: Reference) -> None:
    """Writes the column; nothing appears at `folder` before it is complete.

    Raises:
        UserError: the model does not read such a dataset.
    """
    if dataset.row_length is None:
        raise UserError(f"{dataset.folder / DATASET}: no row length; a reference reads prompts and answers in rows")
    if not same_tokens(checkpoint.tokenizer, dataset.tokenizer):
        raise UserError(
            f"the tokenizer of {checkpoint.folder} is not the corpus's; allowed as a reference: a model with the same "
            "tokens; give the corpus its tokenizer.json"
        )
    if (most := checkpoint.config.max_seq_len or 0) < dataset.row_length - 1:
        raise UserError(f"{checkpoint.folder} reads {most} tokens; allowed: at least the row length - 1 of the corpus")
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {name: _write(partial, name, dataset, checkpoint, reference) for name in dataset.splits}
    sums = {file: sha256(partial / file) for part in files.values() for file in part}
    facts = {"weights": digest, "checkpoint": str(checkpoint.folder), "dataset": _sums(dataset)}
    write_json(partial / FACTS, facts | {"files": files, "sha256": sums})
    commit_folder(partial, folder)


def _write(folder: Path, name: str, dataset: TokenDataset, checkpoint: Checkpoint, reference: Reference) -> list[str]:
    """Writes the column of one split, and returns the names of its files, one per shard."""
    shards = dataset.description["splits"][name]["shards"]
    values, rest = _values(dataset.splits[name], checkpoint, reference), np.zeros(0, np.float32)
    files = [f"{Path(shard['file']).stem}.{REFERENCE}" for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        left = shard["tokens"]
        with (folder / file).open("wb") as out:
            while left:
                rest = rest if len(rest) else next(values)
                out.write(rest[:left].astype("<f4").tobytes())
                left, rest = left - len(rest[:left]), rest[left:]
    return files


@torch.no_grad()
def _values(split: Split, checkpoint: Checkpoint, reference: Reference) -> Iterator[NDArray[Any]]:
    """The log-probability of each token given those before it in its row, 0 where it does not count."""
    assert split.row_length is not None
    model, device = checkpoint.model(reference.device), reference.device
    model.scored_vocab = checkpoint.tokenizer.vocab_size
    samples, rows = Samples(split, split.row_length - 1), max(1, TOKENS // split.row_length)
    for first in range(0, split.documents, rows):
        numbers = np.arange(first, min(first + rows, split.documents))
        batch = samples.batch(numbers, np.zeros_like(numbers)).to(device)
        with autocast(device, compute_dtype(device, reference.precision)):
            scores: TokenScores = model(**batch.inputs, targets=batch.targets)
        yield np.pad(scores.logprobs.cpu().numpy(), ((0, 0), (1, 0))).reshape(-1)
