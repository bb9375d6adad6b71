"""Arithmetic problems on two n-digit numbers: what `adder`, `multiplier` and `adder_chat` share.

There are 10**(2n) problems; problem i has the operands `i // 10**n` and `i % 10**n`. A keyed permutation, computed and
never stored (`data/shuffle.py`), orders them; the first are for validation, the next for test, the rest for training.
So the splits cannot overlap, and 6 digits, 10**12 problems, need no more memory than 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.data.chat_template import ChatTemplate
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.shuffle import permute
from cleangpt.data.tokenizers import CharTokenizer, Tokenizer
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.base import Environment
from cleangpt.environments.exact_answer import ExactAnswer
from cleangpt.errors import UserError

ROWS = 2**16
"""Problems written at a time."""
HELD_OUT = 10_000
"""Default size of the validation and of the test split."""
MOST_TRAINED = 1_000_000
"""Default limit on the size of the training split."""


@dataclass(frozen=True, kw_only=True)
class Problems(Corpus):
    """Problems on two numbers, one per row; the splits are disjoint."""

    digits: int = 3
    """Digits of each operand, 1 to 6."""
    train_samples: int | None = None
    """Training problems; None: all that remain, at most 1,000,000."""
    val_samples: int | None = None
    """Validation problems; None: 10,000, or a tenth of all problems if that is less."""
    test_samples: int | None = None
    """Test problems; None: the default of val_samples."""
    seed: int = 1337
    """Random seed of the splits."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        raise NotImplementedError

    def rows(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8], int]:
        """Token ids and loss mask, both `(len(positions), row_length)`, of the problems at `positions`; and the size
        of their text in bytes."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text."""
        raise NotImplementedError

    def chat_template(self) -> ChatTemplate | None:
        """The chat template of problems written as conversations; None: plain text."""
        return None

    @property
    def problems(self) -> int:
        """Number of different problems."""
        return int(10 ** (2 * self.digits))

    def operands(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The operands of the problems at `positions`."""
        return np.divmod(permute(positions, self.problems, self.seed), 10**self.digits)

    def sizes(self) -> dict[str, int]:
        """Problems in each split, in the order of the permutation."""
        share = min(HELD_OUT, self.problems // 10)
        val = share if self.val_samples is None else self.val_samples
        test = share if self.test_samples is None else self.test_samples
        train = MOST_TRAINED if self.train_samples is None else self.train_samples
        return {"val": val, "test": test, "train": min(train, self.problems - val - test)}

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        if not 1 <= self.digits <= 6:
            raise UserError(f"corpus.digits is {self.digits}; allowed: 1 to 6")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"corpus.seed is {self.seed}; allowed: a whole number of 0 or more")
        taken = 0
        for name in ("val", "test", "train"):
            samples = getattr(self, f"{name}_samples")
            left = self.problems - taken - (name != "train")
            if samples is not None and not 1 <= samples <= left:
                raise UserError(
                    f"corpus.{name}_samples is {samples}; allowed: 1 to {left:,}, "
                    f"since there are {self.problems:,} problems and the splits are disjoint"
                )
            taken += self.sizes()[name]
        if self.sizes()["train"] < 1:
            raise UserError(f"corpus.test_samples leaves none of {self.problems:,} problems to train on; lower it")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the three splits."""
        return write_dataset(
            self, folder, self.tokenizer(), self._groups, sum(self.sizes().values()), console,
            row_length=self.row_length, chat_template=self.chat_template(),
        )  # fmt: skip

    def environment(self, dataset: TokenDataset) -> Environment:
        """Problems as tasks, with reward 1 for an exactly right answer, else 0."""
        return ExactAnswer(dataset)

    def _groups(self, start: int) -> Groups:
        for number, (split, first, last) in enumerate(self._ranges()):
            if number >= start:
                tokens, mask, text_bytes = self.rows(np.arange(first, last, dtype=np.int64))
                lengths = np.full(last - first, self.row_length)
                yield last, [Chunk(split, tokens.reshape(-1), lengths, text_bytes, mask.reshape(-1))]

    def _ranges(self) -> Iterator[tuple[str, int, int]]:
        """Split, first position and the one after the last, of every group."""
        begin = 0
        for split, samples in self.sizes().items():
            for first in range(begin, begin + samples, ROWS):
                yield split, first, min(first + ROWS, begin + samples)
            begin += samples


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Problems):
    """Problems such as ``123+456=9750``: operands padded with zeros, the result padded and written in reverse.

    The result starts with the least significant digit because carries propagate that way. Each row ends with a
    newline, which is the end-of-text token; only the digits of the result and that newline count in the loss.
    """

    sign: ClassVar[str]
    """The operator's character."""

    operator_sign: bool = True
    """Write the operator between the operands."""
    equals_sign: bool = True
    """Write = before the result."""

    @property
    def result_digits(self) -> int:
        """Digits of every result, padded."""
        raise NotImplementedError

    def solve(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """The results of the operation."""
        raise NotImplementedError

    @property
    def row_length(self) -> int:
        """Tokens in every row, the newline included; a sample has one less."""
        return 2 * self.digits + self.operator_sign + self.equals_sign + self.result_digits + 1

    def rows(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8], int]:
        """Token ids and loss mask, both `(len(positions), row_length)`, of the problems at `positions`; and the size
        of their text in bytes."""
        left, right = self.operands(positions)
        tokenizer = self.tokenizer()
        parts = [
            _digits(left, self.digits)[:, ::-1],
            _constant(tokenizer, self.sign * self.operator_sign, len(left)),
            _digits(right, self.digits)[:, ::-1],
            _constant(tokenizer, "=" * self.equals_sign, len(left)),
            _digits(self.solve(left, right), self.result_digits),
            _constant(tokenizer, "\n", len(left)),
        ]
        tokens = np.concatenate(parts, axis=1)
        mask = np.zeros(tokens.shape, np.uint8)
        mask[:, -(self.result_digits + 1) :] = 1
        return tokens, mask, tokens.size

    def tokenizer(self) -> CharTokenizer:
        """Digits are tokens 0 to 9; a newline is the end of text."""
        return CharTokenizer("0123456789" + self.sign * self.operator_sign + "=" * self.equals_sign + "\n", "\n")


def _digits(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The digits of numbers, `(len(numbers), count)`, least significant first."""
    return numbers[:, None] // 10 ** np.arange(count, dtype=np.int64) % 10


def _constant(tokenizer: CharTokenizer, text: str, rows: int) -> NDArray[np.int64]:
    return np.tile(tokenizer.encode(text), (rows, 1))
