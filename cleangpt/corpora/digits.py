"""Handwritten digits to be named in text: scikit-learn's 1,797 of 8 x 8 pixels, which come with the package.

A keyed permutation orders them; the first are for validation, the next for test. Each of the others is also written
moved by a pixel in every direction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.corpora.rows import joined, padded
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import IMAGE_CHARACTER, IMAGES, image_in_rows, image_token, shifted
from cleangpt.data.records import Records
from cleangpt.data.shuffle import permute
from cleangpt.data.tokenizers import CharTokenizer
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.base import Environment
from cleangpt.environments.exact_answer import ExactAnswer
from cleangpt.errors import UserError, require

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT, SIDE = 1797, 8
"""Number of digits, and their height and width in pixels."""
TOKENIZER = CharTokenizer(IMAGE_CHARACTER + "".join(sorted(set("".join(NAMES)))) + "\n", "\n")


@dataclass(frozen=True, kw_only=True)
class Digits(Corpus):
    """Images of digits, each followed by its name, which alone counts. Needs scikit-learn."""

    image_tokens: int = 16
    """Tokens that an image stands at: its patches, as the model's encoder counts them."""
    val_samples: int = 137
    """Validation digits."""
    test_samples: int = 360
    """Test digits."""
    shift: int = 1
    """Training digits are also written moved by up to this many pixels, down and right."""
    seed: int = 1337
    """Random seed of the splits."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.image_tokens + max(map(len, NAMES)) + 1

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        for name, least, most in (("image_tokens", 1, 64), ("val_samples", 1, 800), ("test_samples", 1, 800),
                                  ("shift", 0, 3), ("seed", 0, 2**63 - 1)):  # fmt: skip
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f"corpus.{name} is {value}; allowed: {least} to {most:,}")

    def environment(self, dataset: TokenDataset) -> Environment:
        """Digits to be named, with reward 1 for exactly the right name, else 0."""
        return ExactAnswer(dataset)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the three splits."""
        records = {IMAGES: Records(dtype="uint8", shape=(SIDE, SIDE, 1), tokens=self.image_tokens)}
        return write_dataset(
            self, folder, TOKENIZER, self._groups, COUNT, console, row_length=self.row_length, records=records
        )

    def _groups(self, start: int) -> Groups:
        digits: Any = require("sklearn.datasets").load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        order = permute(np.arange(COUNT), COUNT, self.seed)
        bounds = np.cumsum([0, self.val_samples, self.test_samples])
        parts = {"val": order[: bounds[1]], "test": order[bounds[1] : bounds[2]], "train": order[bounds[2] :]}
        for split, chosen in list(parts.items())[start:]:
            moves = range(-self.shift, self.shift + 1) if split == "train" else range(1)
            moved = [np.stack([shifted(image, down, right) for image in images[chosen]])
                     for down in moves for right in moves]  # fmt: skip
            labels = np.tile(digits.target[chosen], len(moved))
            done = {"val": bounds[1], "test": bounds[2], "train": COUNT}[split]
            yield int(done), [self._chunk(split, np.concatenate(moved), labels)]

    def _chunk(self, split: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Chunk:
        image = np.full(self.image_tokens, image_token(TOKENIZER))
        rows = [joined(image, TOKENIZER.encode(NAMES[label] + "\n")) for label in labels.tolist()]
        tokens, mask = padded(rows, self.row_length)
        return Chunk(
            split, tokens.reshape(-1), np.full(len(rows), self.row_length), sum(len(NAMES[label]) for label in labels),
            mask.reshape(-1), records=image_in_rows(images, self.image_tokens, self.row_length),
        )  # fmt: skip
