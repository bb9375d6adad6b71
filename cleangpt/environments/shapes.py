"""Scenes of shapes: one to four circles, squares and triangles on a grid, their captions, and questions about them.

Every scene follows from its seed. Some pairs of colour and shape are held out: scenes with one of them are for test
alone, so that a model has seen the colour and the shape, but never the one in the other.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.shuffle import mix
from cleangpt.environments.base import Episode
from cleangpt.environments.exact_answer import ExactAnswer
from cleangpt.errors import require

GRID, CELL = 3, 16
"""Cells in each direction, and pixels in each direction of a cell."""
SIDE = GRID * CELL
"""Height and width of a picture in pixels."""
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (240, 210, 30),
    "purple": (150, 60, 190), "grey": (130, 130, 130),
}  # fmt: skip
SIZES = {"small": 3, "large": 7}
"""Half of a shape's height and width in pixels."""
CELLS = (
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
HELD_OUT = (("purple", "triangle"), ("yellow", "square"))
"""Pairs that only the test split has."""
MOST = 4
"""Shapes in a scene."""


@dataclass(frozen=True, order=True)
class Thing:
    """A shape in a scene."""

    cell: int
    """From 0, row by row."""
    size: str
    color: str
    shape: str

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.color, self.shape

    @property
    def name(self) -> str:
        """Colour and shape in words."""
        return f"{self.color} {self.shape}"


Scene = tuple[Thing, ...]
"""Shapes, in the order of their cells."""


def draw_scene(seed: int, held_out: bool, most: int = MOST) -> Scene:
    """A scene of `most` shapes or fewer; `held_out` says whether it has a held-out pair."""
    for attempt in range(1000):
        draw = np.random.default_rng(mix(seed, attempt))
        cells = np.sort(draw.permutation(GRID**2)[: draw.integers(1, most + 1)]).tolist()
        scene = tuple(
            Thing(cell, *(choices[draw.integers(len(choices))] for choices in (tuple(SIZES), tuple(COLORS), SHAPES)))
            for cell in cells
        )
        if any(thing.pair in HELD_OUT for thing in scene) == held_out:
            return scene
    raise AssertionError("one scene in three is of either kind")


def picture(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene `(height, width, 3)`; needs Pillow."""
    image: Any = require("PIL.Image").new("RGB", (SIDE, SIDE), "white")
    pen: Any = require("PIL.ImageDraw").Draw(image)
    for thing in scene:
        row, column = divmod(thing.cell, GRID)
        x, y, half = column * CELL + CELL // 2, row * CELL + CELL // 2, SIZES[thing.size]
        box = (x - half, y - half, x + half - 1, y + half - 1)
        if thing.shape == "circle":
            pen.ellipse(box, COLORS[thing.color])
        elif thing.shape == "square":
            pen.rectangle(box, COLORS[thing.color])
        else:
            pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], COLORS[thing.color])
    return np.asarray(image)


def caption(scene: Scene) -> str:
    """All shapes of a scene in words, row by row."""
    return ", ".join(f"{thing.size} {thing.name} {CELLS[thing.cell]}" for thing in scene)


# Questions ------------------------------------------------------------------------------------------------------------
def ask_exists(scene: Scene, draw: np.random.Generator) -> tuple[str, str] | None:
    """Whether there is a shape of a colour: every second time one that there is, every fourth one of whose colour there
    are only other shapes."""
    there = [thing.name for thing in scene]
    absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in there]
    close = [name for name in absent if name.split()[0] in {thing.color for thing in scene}]
    kind = draw.integers(4)
    name = _choose((there, there, close or absent, absent)[kind], draw)
    return f"is there a {name}?", "yes" if kind < 2 else "no"


def ask_size(scene: Scene, draw: np.random.Generator) -> tuple[str, str] | None:
    """How large a shape is that is the only one of its kind."""
    if not (single := _singles(scene)):
        return None
    thing = _choose(single, draw)
    return f"what size is the {thing.name}?", thing.size


def ask_relation(scene: Scene, draw: np.random.Generator) -> tuple[str, str] | None:
    """Whether one shape is left of, or above, another: every second time it is."""
    holds: Callable[[Thing, Thing], bool]
    word, holds = (("left of", _is_left), ("above", _is_above))[draw.integers(2)]
    single, wanted = _singles(scene), bool(draw.integers(2))
    pairs = [(one, other) for one in single for other in single if one != other and holds(one, other) == wanted
             and (wanted or holds(other, one))]  # fmt: skip
    if not pairs:
        return None
    one, other = _choose(pairs, draw)
    return f"is the {one.name} {word} the {other.name}?", "yes" if wanted else "no"


def ask_place(scene: Scene, draw: np.random.Generator) -> tuple[str, str] | None:
    """Where a shape is that is the only one of its kind."""
    if not (single := _singles(scene)):
        return None
    thing = _choose(single, draw)
    return f"where is the {thing.name}?", CELLS[thing.cell]


def ask_color_count(scene: Scene, draw: np.random.Generator) -> tuple[str, str] | None:
    """How many shapes have a colour."""
    counts = Counter(thing.color for thing in scene)
    number = _choose(sorted({counts[color] for color in COLORS}), draw)
    color = _choose([color for color in COLORS if counts[color] == number], draw)
    return f"how many {color} shapes are there?", str(number)


def ask_count(scene: Scene, draw: np.random.Generator) -> tuple[str, str] | None:
    """How many shapes there are."""
    return "how many shapes are there?", str(len(scene))


QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "exists": ask_exists,
    "size": ask_size,
    "relation": ask_relation,
    "color_count": ask_color_count,
    "count": ask_count,
}
"""Kinds of questions."""
LEADING: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {"place": ask_place}
"""Kinds for training alone. A yes or no says little about which patch to look at, a place says it all: who can find a
shape by its name can compare two."""
PATTERNS = {
    "exists": r"is there an? ", "size": r"what size ", "relation": r"is the ", "color_count": r"how many \w+ shapes ",
    "count": r"how many shapes ",
}  # fmt: skip
"""How a question of each kind begins."""


def ask(scene: Scene, kind: str, seed: int) -> tuple[str, str] | None:
    """A question of a kind about a scene, and its answer; None: the scene has none of this kind."""
    return (QUESTIONS | LEADING)[kind](scene, np.random.default_rng(seed))


def kind_of(question: str) -> str | None:
    """The kind of a question; None: it is not one."""
    return next((kind for kind, pattern in PATTERNS.items() if re.match(pattern, question)), None)


def _singles(scene: Scene) -> list[Thing]:
    counts = Counter(thing.pair for thing in scene)
    return [thing for thing in scene if counts[thing.pair] == 1]


def _is_left(one: Thing, other: Thing) -> bool:
    return one.cell % GRID < other.cell % GRID


def _is_above(one: Thing, other: Thing) -> bool:
    return one.cell // GRID < other.cell // GRID


def _choose(choices: Any, draw: np.random.Generator) -> Any:
    return choices[draw.integers(len(choices))]


@dataclass(frozen=True)
class ShapeQuestions(ExactAnswer):
    """Questions about scenes, each with one right answer; measured by kind of question."""

    def measures(self, episode: Episode) -> dict[str, float]:
        """The reward, by the kind of the question."""
        text = self.dataset.tokenizer.decode(episode.prompt.tokens).strip()
        return {kind: episode.total_reward} if (kind := kind_of(text)) else {}
