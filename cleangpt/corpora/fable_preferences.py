"""Preferences among openings of fables: of two continuations of a prompt, the one with the higher `gold` is preferred.

Both are sentences of the grammar, so that they are what a model fine-tuned on `fable_openings` would write itself. A
share of the training labels can be flipped, as people's are now and then. No pair is drawn twice, none is a tie, and
the validation pairs, whose labels are right, do not depend on the number of training pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.corpora.fable_openings import (
    CONTINUATIONS,
    check_row,
    check_seed,
    continuation,
    ranges,
    sentence,
    tokenizer,
)
from cleangpt.corpora.reading import unit_hash
from cleangpt.corpora.rows import PAIR, RATED, mismatched, padded, per_token
from cleangpt.data.columns import Column
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.shuffle import permute
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.base import Environment
from cleangpt.environments.fables import FablesGold, gold, prompts
from cleangpt.errors import UserError
from cleangpt.validation import Share

CANDIDATES = 4096
"""Pairs drawn at a time, ties among them."""


@dataclass(frozen=True, kw_only=True)
class FablePreferences(Corpus):
    """Pairs of openings, the better one first; or each by itself, with a label. Needs tokenizers."""

    train_pairs: int = 2000
    """Training pairs."""
    val_pairs: int = 1000
    """Validation pairs."""
    flip: Share = 0.0
    """Share of the training pairs whose labels are flipped."""
    form: Literal["pairs", "labels"] = "pairs"
    """pairs: a chosen and a rejected answer; labels: single answers, desirable or not, for KTO."""
    row: int = 20
    """Tokens per sample, padding included; data.seq_len must be equal to it. A sentence has up to 19."""
    seed: int = 1337
    """Random seed of the pairs, and of those whose labels are flipped."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.row + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        check_row(self.row)
        check_seed(self.seed)
        for name in ("val_pairs", "train_pairs"):
            if not 1 <= (count := getattr(self, name)) <= 10**8:
                raise UserError(f"corpus.{name} is {count}; allowed: 1 to 100,000,000")

    def environment(self, dataset: TokenDataset) -> Environment:
        """The prompts to be continued, scored by their bright words."""
        return FablesGold(dataset)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        paired = self.form == "pairs"
        columns = {"margin": Column(dtype="float32", role="extra")}
        labels = {"desirable": Column(dtype="uint8", role="extra")}
        return write_dataset(
            self, folder, tokenizer(), self._groups, self.val_pairs + self.train_pairs, console,
            row_length=self.row_length, columns=columns if paired else labels, group=PAIR if paired else RATED,
        )  # fmt: skip

    def _groups(self, start: int) -> Groups:
        pairs = self.pairs()
        splits = {"val": (0, self.val_pairs), "train": (self.val_pairs, self.val_pairs + self.train_pairs)}
        for number, (split, first, last) in enumerate(ranges(splits)):
            found = list(islice(pairs, last - first))
            if number >= start:
                share = self.flip if split == "train" else 0.0
                flipped = [unit_hash(f"{self.seed}:{position}") < share for position in range(first, last)]
                yield last, [self._chunk(split, found, flipped)]

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """Prompt, better continuation and worse one, each by its number."""
        golds = np.array([gold(continuation(number)) for number in range(CONTINUATIONS)])
        total = len(prompts()) * CONTINUATIONS**2
        for first in range(0, total, CANDIDATES):
            drawn = permute(np.arange(first, min(first + CANDIDATES, total)), total, self.seed)
            prompt, one, other = np.unravel_index(drawn, (len(prompts()), CONTINUATIONS, CONTINUATIONS))
            better = np.where(golds[one] > golds[other], one, other)
            worse = one + other - better
            clear = golds[one] != golds[other]
            yield from zip(*(part[clear].tolist() for part in (prompt, better, worse)), strict=True)

    def _chunk(self, split: str, pairs: list[tuple[int, int, int]], flipped: list[bool]) -> Chunk:
        """The rows of pairs, the preferred answer of each first."""
        ordered = [(prompt, *((worse, better) if flip else (better, worse)))
                   for (prompt, better, worse), flip in zip(pairs, flipped, strict=True)]  # fmt: skip
        rows = [sentence(prompt, answer) for prompt, *answers in ordered for answer in answers]
        if self.form == "labels":
            desirable = np.repeat(np.arange(len(rows)) % 2 == 0, 2)
            rows = [row for both in mismatched(rows, step=2) for row in both]
            columns = {"desirable": per_token(desirable.tolist(), self.row_length, np.uint8)}
        else:
            columns = {"margin": per_token([0.0] * len(rows), self.row_length, np.float32)}
        tokens, mask = padded(rows, self.row_length)
        text_bytes = sum(len(prompts()[prompt] + continuation(number)) for prompt, *both in ordered for number in both)
        return Chunk(
            split, tokens.reshape(-1), np.full(len(rows), self.row_length), text_bytes, mask.reshape(-1),
            {"pairs": len(pairs), "flipped": sum(flipped)}, columns,
        )  # fmt: skip
