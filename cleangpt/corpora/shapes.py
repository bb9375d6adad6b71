"""Pictures of shapes with captions, or with questions and answers; drawn when the dataset is prepared.

A word is one token, of a byte-pair encoding trained on captions and questions alike, so that a model of the one can
learn the other; or a byte is, so that they mix with other data of bytes. The scenes of the splits differ; those of the
test split have a pair of colour and shape that no other has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.corpora.rows import groups_of, joined, padded
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import IMAGE_TOKEN, IMAGES, image_in_rows, image_token
from cleangpt.data.pictures import resized
from cleangpt.data.records import Records
from cleangpt.data.shuffle import mix
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, train_bpe
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.base import Environment
from cleangpt.environments.exact_answer import ExactAnswer
from cleangpt.environments.shapes import (
    LEADING,
    MOST,
    QUESTIONS,
    SIDE,
    Scene,
    ShapeQuestions,
    ask,
    caption,
    draw_scene,
    picture,
)
from cleangpt.errors import UserError
from cleangpt.validation import Bounds

Tokens = NDArray[np.int64]
"""`(length,)`."""
VOCABULARY, LEARNED_FROM = 384, 2000
"""Tokens at most, and scenes that the tokenizer is learned from."""
GROUP = 500
"""Scenes written at a time."""
SPLITS = {"val": 1, "test": 2, "train": 3}
"""Seeds of the splits."""


@lru_cache(maxsize=1)
def word_tokenizer() -> BPETokenizer:
    """The tokenizer of captions, questions and answers in which a word is a token; needs tokenizers."""
    return train_bpe(_texts(), VOCABULARY, [IMAGE_TOKEN])


def _texts() -> Iterator[str]:
    for number in range(LEARNED_FROM):
        scene = draw_scene(mix(0, number), held_out=number % 2 == 1)
        yield caption(scene)
        for kind in (*QUESTIONS, *LEADING):
            if asked := ask(scene, kind, number):
                yield f"{asked[0]} {asked[1]}"


@dataclass(frozen=True, kw_only=True)
class Shapes(Corpus):
    """Pictures, one in each row, and text about them."""

    longest: ClassVar[dict[str, int]]
    """Tokens of the longest text of a row, by tokenizer."""

    train_samples: Annotated[int, Bounds(1, 2**24)] = 20_000
    """Training scenes."""
    val_samples: Annotated[int, Bounds(1, 2**20)] = 500
    """Validation scenes."""
    test_samples: Annotated[int, Bounds(1, 2**20)] = 500
    """Test scenes, each with a pair of colour and shape that is in no other split."""
    most_shapes: Annotated[int, Bounds(1, MOST)] = MOST
    """Shapes in a scene at most."""
    tokenizer: Literal["word", "byte"] = "word"
    """word: a token for each word; byte: one for each byte of UTF-8."""
    row: Annotated[int, Bounds(2, 2**16)] | None = None
    """Tokens per sample, as in a mixture with rows of other corpora; None: as many as the longest text needs."""
    side: Annotated[int, Bounds(16, 1024)] = SIDE
    """Height and width of a picture in pixels."""
    image_tokens: Annotated[int, Bounds(1, 2304)] = 36
    """Tokens that an image stands at: its patches, as the model's encoder counts them."""
    pictures: bool = True
    """Whether rows begin with pictures; without them, the text alone is learned."""
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 1337
    """Random seed of the scenes."""

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.image_tokens + self.longest[self.tokenizer] + 1 if self.row is None else self.row + 1

    @property
    def encoding(self) -> BPETokenizer | ByteTokenizer:
        """The tokenizer."""
        return word_tokenizer() if self.tokenizer == "word" else ByteTokenizer()

    def text(self, scene: Scene, number: int, split: str) -> tuple[Tokens, Tokens]:
        """The tokens before a scene's picture, and those after it, which count."""
        raise NotImplementedError

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes the three splits."""
        shown = {IMAGES: Records(dtype="uint8", shape=(self.side, self.side, 3), tokens=self.image_tokens)}
        records = shown if self.pictures else None
        return write_dataset(
            self, folder, self.encoding, self._groups, sum(self._sizes().values()), console, row_length=self.row_length,
            records=records,
        )  # fmt: skip

    def ended(self, text: str) -> Tokens:
        """The tokens of a text and the end of text."""
        return np.append(self.encoding.encode(text), np.int64(self.encoding.eos_id or 0))

    def scenes(self, split: str, first: int, last: int) -> list[Scene]:
        """Some scenes of a split; those of train are none of val's."""
        kept = _validation(self.seed, self.val_samples, self.most_shapes) if split == "train" else frozenset()
        found = []
        for number in range(first, last):
            attempts = (draw_scene(mix(self.seed, SPLITS[split], number, attempt), split == "test", self.most_shapes)
                        for attempt in range(1000))  # fmt: skip
            found.append(next(scene for scene in attempts if scene not in kept))
        return found

    def _sizes(self) -> dict[str, int]:
        return {"val": self.val_samples, "test": self.test_samples, "train": self.train_samples}

    def _groups(self, start: int) -> Groups:
        for split, first, last, done in groups_of(self._sizes(), GROUP)[start:]:
            yield done, [self._chunk(split, first, self.scenes(split, first, last))]

    def _chunk(self, split: str, first: int, scenes: list[Scene]) -> Chunk:
        known = self.encoding
        image = np.full(self.image_tokens * self.pictures, image_token(known))
        texts = [self.text(scene, first + number, split) for number, scene in enumerate(scenes)]
        rows = [joined(np.concatenate([before, image]), after) for before, after in texts]
        if (longest := max(len(row.tokens) for row in rows)) > self.row_length:
            raise UserError(f"corpus.row is {self.row}; allowed: {longest - 1} or more, into which a text fits")
        tokens, mask = padded(rows, self.row_length)
        text_bytes = sum(len(known.decode(np.concatenate(text).tolist())) for text in texts)
        chunk = Chunk(split, tokens.reshape(-1), np.full(len(rows), self.row_length), text_bytes, mask.reshape(-1))
        if not self.pictures:
            return chunk
        images: NDArray[np.uint8] = np.stack([resized(picture(scene), self.side, self.side) for scene in scenes])
        ends = np.array([row.start for row in rows])
        return replace(chunk, records=image_in_rows(images, ends, self.row_length))


@lru_cache(maxsize=4)
def _validation(seed: int, count: int, most: int) -> frozenset[Scene]:
    return frozenset(draw_scene(mix(seed, SPLITS["val"], number, 0), False, most) for number in range(count))


@dataclass(frozen=True, kw_only=True)
class ShapesCaptions(Shapes):
    """Pictures, each followed by a caption that names every shape in it, which alone counts. Needs tokenizers and
    Pillow."""

    longest: ClassVar[dict[str, int]] = {"word": 25, "byte": 143}

    def text(self, scene: Scene, number: int, split: str) -> tuple[Tokens, Tokens]:
        """Nothing, and the caption with the end of text."""
        return np.zeros(0, np.int64), self.ended(caption(scene))

    def environment(self, dataset: TokenDataset) -> Environment | None:
        """Pictures to be captioned, with reward 1 for exactly the caption, else 0."""
        return ExactAnswer(dataset) if self.pictures else None


@dataclass(frozen=True, kw_only=True)
class ShapesVQA(Shapes):
    """Questions, each before its picture, and answers, which count. Needs tokenizers and Pillow.

    A patch sees the question, so that it can tell by itself whether it is what is asked for. The kinds of questions
    come in turn; for where something is, in training alone.
    """

    longest: ClassVar[dict[str, int]] = {"word": 16, "byte": 56}

    train_samples: Annotated[int, Bounds(1, 2**24)] = 60_000
    """Training scenes, each with one question."""

    def text(self, scene: Scene, number: int, split: str) -> tuple[Tokens, Tokens]:
        """The question, and its answer with the end of text."""
        kinds = [*QUESTIONS, *(LEADING if split == "train" else ())]
        attempts = (
            ask(scene, kinds[(number + attempt) % len(kinds)], mix(self.seed, SPLITS[split], number, attempt))
            for attempt in range(1000)
        )
        question, answer = next(asked for asked in attempts if asked)
        return self.encoding.encode(question), self.ended(f" {answer}")

    def environment(self, dataset: TokenDataset) -> Environment | None:
        """Questions about pictures, with reward 1 for exactly the right answer, else 0."""
        return ShapeQuestions(dataset) if self.pictures else None
