"""Scenes are what their pictures show, and questions about them have the right answers."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cleangpt.environments.shapes import (
    CELL,
    CELLS,
    COLORS,
    GRID,
    HELD_OUT,
    QUESTIONS,
    SIDE,
    SIZES,
    Scene,
    ask,
    caption,
    draw_scene,
    kind_of,
    picture,
)

SCENES = [draw_scene(seed, held_out=seed % 2 == 0) for seed in range(120)]


def read_caption(text: str) -> list[tuple[str, str, str, str]]:
    """Size, colour, shape and place of everything that a caption names."""
    return [tuple(part.split(" ", 3)) for part in text.split(", ")]  # type: ignore[misc]


def test_a_scene_follows_from_its_seed() -> None:
    assert [draw_scene(seed, held_out=seed % 2 == 0) for seed in range(120)] == SCENES
    assert {len(scene) for scene in SCENES} == {1, 2, 3, 4}
    assert all(len({thing.cell for thing in scene}) == len(scene) for scene in SCENES)


def test_held_out_pairs_are_only_where_they_are_asked_for() -> None:
    for seed, scene in enumerate(SCENES):
        assert any(thing.pair in HELD_OUT for thing in scene) == (seed % 2 == 0)


@pytest.mark.parametrize("scene", SCENES[:30])
def test_a_picture_shows_its_scene_and_nothing_else(scene: Scene) -> None:
    """Each cell is white, or has one colour, whose extent is the size and whose area tells the shape."""
    shown = picture(scene)
    assert shown.shape == (SIDE, SIDE, 3) and shown.dtype == np.uint8
    things = {thing.cell: thing for thing in scene}
    for number in range(GRID**2):
        row, column = divmod(number, GRID)
        cell = shown[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].reshape(-1, 3)
        colors = {tuple(pixel) for pixel in cell.tolist()} - {(255, 255, 255)}
        if number not in things:
            assert not colors
            continue
        thing = things[number]
        assert colors == {COLORS[thing.color]}
        share = (cell != 255).any(1).sum() / (2 * SIZES[thing.size]) ** 2
        expected = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5}[thing.shape]
        assert abs(share - expected) < 0.12


def test_captions_say_everything_row_by_row() -> None:
    for scene in SCENES:
        read = read_caption(caption(scene))
        assert read == [(thing.size, thing.color, thing.shape, CELLS[thing.cell]) for thing in scene]
        assert [CELLS.index(place) for *_, place in read] == sorted(CELLS.index(place) for *_, place in read)
    assert len({caption(scene) for scene in SCENES}) == len(set(SCENES))


def right_answer(question: str, text: str) -> str:
    """The answer, from the words of the question and of the caption alone."""
    things, words = read_caption(text), question.rstrip("?").split()
    named = [[thing for thing in things if thing[1:3] == pair] for pair in pairwise(words)]
    found = [match[0] for match in named if match]
    place = {thing: divmod(CELLS.index(thing[3]), GRID) for thing in things}
    if question.startswith("is there a"):
        return "yes" if found else "no"
    if question.startswith("what size"):
        return found[0][0]
    if question.startswith("how many shapes"):
        return str(len(things))
    if question.startswith("how many"):
        return str(sum(thing[1] == words[2] for thing in things))
    axis = 1 if "left of" in question else 0
    return "yes" if place[found[0]][axis] < place[found[1]][axis] else "no"


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_follow_from_the_caption(kind: str) -> None:
    asked = [(scene, found) for number, scene in enumerate(SCENES) if (found := ask(scene, kind, number))]
    assert len(asked) > 30
    for scene, (question, answer) in asked:
        assert answer == right_answer(question, caption(scene))
        assert kind_of(question) == kind


@pytest.mark.parametrize("kind", ["exists", "relation", "size"])
def test_guessing_an_answer_is_right_half_of_the_time(kind: str) -> None:
    scenes = [draw_scene(seed, held_out=False) for seed in range(600)]
    answers = Counter(found[1] for number, scene in enumerate(scenes) if (found := ask(scene, kind, number)))
    assert len(answers) == 2 and max(answers.values()) < 0.6 * sum(answers.values())


def test_other_texts_are_no_questions() -> None:
    assert kind_of("small red circle top") is None


def test_a_place_is_asked_of_what_is_there_once_and_only_in_training() -> None:
    asked = 0
    for seed, scene in enumerate(SCENES):
        named = read_caption(caption(scene))
        if (question := ask(scene, "place", seed)) is None:
            assert all(count > 1 for count in Counter(thing.pair for thing in scene).values())
            continue
        color, shape = question[0].removeprefix("where is the ").removesuffix("?").split()
        assert [place for _, *pair, place in named if pair == [color, shape]] == [question[1]]
        asked += 1
    assert asked > 100 and "place" not in QUESTIONS
