"""Every digit comes with its name; a training digit also moved by a pixel."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cleangpt.corpora import prepare
from cleangpt.corpora.digits import COUNT, NAMES, TOKENIZER, Digits
from cleangpt.data.images import shifted
from cleangpt.data.records import records_of_row
from cleangpt.errors import UserError


def test_digits_are_named(workplace: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    named = {np.rint(image * 255 / 16).astype(np.uint8).tobytes(): NAMES[label]
             for image, label in zip(digits.images, digits.target, strict=True)}  # fmt: skip
    dataset = prepare(Digits(shift=0), Path("data")).sources[0].dataset
    seen: Counter[bytes] = Counter()
    for split in dataset.splits.values():
        for number in range(split.documents):
            tokens, mask = split.read_row(number)
            image = records_of_row(split.records, number * len(tokens), len(tokens))["images"].numpy()
            name = TOKENIZER.decode([token for token, counts in zip(tokens, mask, strict=True) if counts])
            assert name == named[image.tobytes()] + "\n"
            seen[image.tobytes()] += 1
    assert sum(seen.values()) == COUNT


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (-1, 2), (-3, -3)])
def test_shifting_moves_every_pixel(down: int, right: int) -> None:
    image = np.arange(1, 17).reshape(4, 4, 1)
    moved = shifted(image, down, right)
    for row in range(4):
        for column in range(4):
            inside = 0 <= row - down < 4 and 0 <= column - right < 4
            assert moved[row, column, 0] == (image[row - down, column - right, 0] if inside else 0)


def test_fields_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"corpus.shift is 4; allowed: 0 to 3"):
        Digits(shift=4).check()
