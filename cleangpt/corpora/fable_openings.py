"""Openings of fables: the first sentence of the grammar's stories, to be continued from ``Long ago there lived a``.

There are 73,728 sentences; a keyed permutation orders them, and the first are for validation. A word is one token, of a
byte-pair encoding trained on the grammar itself, so that all corpora of openings have the same tokens.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.corpora.rows import Row, joined, padded
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.shuffle import permute
from cleangpt.data.tokenizers import BPETokenizer, train_bpe
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.base import Environment
from cleangpt.environments.fables import WORDS, FablesGold, opening, prompts
from cleangpt.errors import UserError

KINDS = ("trait", "animal", "hero", "home")
SIZES = [len(WORDS[kind]) for kind in KINDS]
CONTINUATIONS = math.prod(SIZES)
"""Number of sentences with the same prompt."""
SENTENCES = CONTINUATIONS * len(WORDS["once"])
VOCABULARY = 509
"""256 bytes, the end of text, and 252 merges that make every word of the grammar one token."""
GROUP = 1000
"""Sentences written at a time."""


@lru_cache(maxsize=1)
def tokenizer() -> BPETokenizer:
    """The tokenizer of all corpora of openings; needs tokenizers."""
    return train_bpe(map(_text, range(0, SENTENCES, 37)), VOCABULARY)


@lru_cache(maxsize=1)
def encoded() -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """The tokens of every prompt, and of every continuation with the end of text."""
    known = tokenizer()
    end = np.array([known.eos_id], np.int64)
    answers = known.encode_all([continuation(number) for number in range(CONTINUATIONS)])
    return known.encode_all(prompts()), [np.append(answer, end) for answer in answers]


def continuation(number: int) -> str:
    """One of the texts that may follow a prompt."""
    digits = np.unravel_index(number, SIZES)
    return opening(*(WORDS[kind][digit] for kind, digit in zip(KINDS, digits, strict=True)))


def _text(number: int) -> str:
    """A whole sentence."""
    once, rest = divmod(number, CONTINUATIONS)
    return prompts()[once] + continuation(rest)


def sentence(prompt: int, answer: int) -> Row:
    """The row of a prompt and a continuation, each by its number."""
    questions, answers = encoded()
    return joined(questions[prompt], answers[answer])


@dataclass(frozen=True, kw_only=True)
class FableOpenings(Corpus):
    """First sentences of fables, each a prompt and what follows it, which alone counts. Needs tokenizers."""

    train_sentences: int = 20_000
    """Training sentences."""
    val_sentences: int = 1000
    """Validation sentences."""
    row: int = 20
    """Tokens per sample, padding included; data.seq_len must be equal to it. A sentence has up to 19."""
    seed: int = 1337
    """Random seed of the choice of sentences."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.row + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        check_row(self.row)
        taken = 0
        for name in ("val_sentences", "train_sentences"):
            if not 1 <= (count := getattr(self, name)) <= SENTENCES - taken:
                raise UserError(
                    f"corpus.{name} is {count}; allowed: 1 to {SENTENCES - taken:,}, of {SENTENCES:,} sentences"
                )
            taken += count
        check_seed(self.seed)

    def environment(self, dataset: TokenDataset) -> Environment:
        """Sentences to be continued, scored by their bright words."""
        return FablesGold(dataset)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        total = self.val_sentences + self.train_sentences
        return write_dataset(self, folder, tokenizer(), self._groups, total, console, row_length=self.row_length)

    def _groups(self, start: int) -> Groups:
        sizes = {
            "val": (0, self.val_sentences),
            "train": (self.val_sentences, self.val_sentences + self.train_sentences),
        }
        for split, first, last in ranges(sizes)[start:]:
            numbers = permute(np.arange(first, last), SENTENCES, self.seed)
            rows = [sentence(*divmod(number, CONTINUATIONS)) for number in numbers.tolist()]
            tokens, mask = padded(rows, self.row_length)
            lengths = np.full(len(rows), self.row_length)
            text_bytes = sum(len(_text(number)) for number in numbers.tolist())
            yield last, [Chunk(split, tokens.reshape(-1), lengths, text_bytes, mask.reshape(-1))]


def ranges(splits: dict[str, tuple[int, int]]) -> list[tuple[str, int, int]]:
    """Split, first position and the one after the last, of every group."""
    return [
        (split, begin, min(begin + GROUP, last))
        for split, (first, last) in splits.items()
        for begin in range(first, last, GROUP)
    ]


def check_row(row: int) -> None:
    """Raises UserError for rows into which not every sentence fits."""
    if not 20 <= row <= 2**16:
        raise UserError(f"corpus.row is {row}; allowed: 20 to 65,536, into which every sentence fits")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that is not one."""
    if not 0 <= seed < 2**63:
        raise UserError(f"corpus.seed is {seed}; allowed: a whole number of 0 or more")
