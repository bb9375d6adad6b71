"""Pictures of words to be read: invented words of 3 to 8 letters, drawn in the fonts that come with matplotlib.

Font, size, place and the greys of ink and paper are drawn for each picture. A word belongs to one split, by a checksum,
so that those of validation and test are never seen in training.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.corpora.rows import groups_of, joined, padded
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import IMAGE_CHARACTER, IMAGES, image_in_rows, image_token
from cleangpt.data.records import Records
from cleangpt.data.shuffle import mix
from cleangpt.data.tokenizers import CharTokenizer
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.base import Environment
from cleangpt.environments.exact_answer import Word
from cleangpt.errors import require
from cleangpt.validation import Bounds

HEIGHT, WIDTH = 16, 80
"""Of a picture in pixels."""
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
LARGEST, SMALLEST = 13, 10
"""Font sizes in pixels; a word that would be too wide gets a smaller one."""
SHORTEST, LONGEST = 3, 8
"""Letters of a word."""
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
SPLITS = {"val": 0, "test": 1, "train": 2}
"""Seeds of the splits. A tenth of all words is for each of the first two."""
TOKENIZER = CharTokenizer(IMAGE_CHARACTER + "abcdefghijklmnopqrstuvwxyz\n", "\n")
GROUP = 1000
"""Words written at a time."""


@dataclass(frozen=True, kw_only=True)
class RenderedWords(Corpus):
    """Pictures of 80 x 16 pixels, each followed by the word that it shows, which alone counts. Needs Pillow."""

    train_samples: Annotated[int, Bounds(1, 2**24)] = 100_000
    """Training pictures."""
    val_samples: Annotated[int, Bounds(1, 2**20)] = 500
    """Validation pictures."""
    test_samples: Annotated[int, Bounds(1, 2**20)] = 1000
    """Test pictures."""
    image_tokens: Annotated[int, Bounds(1, 1280)] = 20
    """Tokens that an image stands at: its patches, as the model's encoder counts them."""
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 1337
    """Random seed of words and pictures."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.image_tokens + LONGEST + 1

    def words(self, split: str, first: int, last: int) -> list[str]:
        """Some words of a split."""
        drawn = ((invent(mix(self.seed, SPLITS[split], number, attempt)) for attempt in range(1000))
                 for number in range(first, last))  # fmt: skip
        return [next(word for word in attempts if split_of(word) == split) for attempts in drawn]

    def environment(self, dataset: TokenDataset) -> Environment:
        """Pictures to be read, with reward 1 for exactly the word, else 0; and the share of letters that are right."""
        return Word(dataset)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the three splits."""
        records = {IMAGES: Records(dtype="uint8", shape=(HEIGHT, WIDTH, 1), tokens=self.image_tokens)}
        return write_dataset(
            self, folder, TOKENIZER, self._groups, sum(self._sizes().values()), console, row_length=self.row_length,
            records=records,
        )  # fmt: skip

    def _sizes(self) -> dict[str, int]:
        return {"val": self.val_samples, "test": self.test_samples, "train": self.train_samples}

    def _groups(self, start: int) -> Groups:
        for split, first, last, done in groups_of(self._sizes(), GROUP)[start:]:
            yield done, [self._chunk(split, first, last)]

    def _chunk(self, split: str, first: int, last: int) -> Chunk:
        image, words = np.full(self.image_tokens, image_token(TOKENIZER)), self.words(split, first, last)
        pictures = [picture(word, mix(self.seed, SPLITS[split], first + number)) for number, word in enumerate(words)]
        tokens, mask = padded([joined(image, TOKENIZER.encode(word + "\n")) for word in words], self.row_length)
        return Chunk(
            split, tokens.reshape(-1), np.full(len(words), self.row_length), sum(map(len, words)), mask.reshape(-1),
            records=image_in_rows(np.stack(pictures), self.image_tokens, self.row_length),
        )  # fmt: skip


def invent(seed: int) -> str:
    """A word: mostly, a consonant follows a vowel and a vowel a consonant."""
    draw = np.random.default_rng(seed)
    word, vowel = "", bool(draw.integers(2))
    for _ in range(draw.integers(SHORTEST, LONGEST + 1)):
        letters = VOWELS if vowel else CONSONANTS
        word += letters[draw.integers(len(letters))]
        vowel = vowel == (draw.random() < 0.3)
    return word


def split_of(word: str) -> str:
    """The split that a word belongs to."""
    return {0: "val", 1: "test"}.get(zlib.crc32(word.encode()) % 10, "train")


def picture(word: str, seed: int) -> NDArray[np.uint8]:
    """A picture of a word `(height, width, 1)`; needs Pillow."""
    draw = np.random.default_rng(seed)
    name = FONTS[draw.integers(len(FONTS))]
    for size in range(int(draw.integers(SMALLEST, LARGEST + 1)), 0, -1):
        left, top, right, bottom = font(name, size).getbbox(word)
        if right - left <= WIDTH and bottom - top <= HEIGHT:
            break
    paper, ink = int(draw.integers(150, 256)), int(draw.integers(0, 101))
    x, y = draw.integers(0, WIDTH - (right - left) + 1), draw.integers(0, HEIGHT - (bottom - top) + 1)
    image: Any = require("PIL.Image").new("L", (WIDTH, HEIGHT), paper)
    require("PIL.ImageDraw").Draw(image).text((int(x - left), int(y - top)), word, ink, font(name, size))
    return np.asarray(image)[..., None]


@lru_cache(maxsize=128)
def font(name: str, size: int) -> Any:
    """A font of matplotlib's in a size in pixels."""
    folder = Path(require("matplotlib").get_data_path()) / "fonts" / "ttf"
    return require("PIL.ImageFont").truetype(str(folder / f"{name}.ttf"), size)
