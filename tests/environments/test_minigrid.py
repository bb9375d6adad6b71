"""Grids of MiniGrid and BabyAI: cells as ids, the bot's advice, and where it is lost."""

from typing import Any

import numpy as np
import pytest

from cleangpt.corpora.demonstrations import demonstrate
from cleangpt.data.modalities import Dict, Image, Modalities, TokenRanges
from cleangpt.data.timesteps import Timesteps
from cleangpt.data.tokenizers import ByteTokenizer, ModalityTokenizer
from cleangpt.environments.acting import Lost
from cleangpt.environments.experts import find_expert, record
from cleangpt.environments.gymnasium import Gymnasium, convert, make, spaces
from cleangpt.environments.minigrid import (
    COLOUR_NAMES,
    KIND_NAMES,
    Grid,
    bot,
    cell_ids,
    mission_numbers,
    objects,
    with_goals,
)
from cleangpt.errors import UserError

gymnasium = pytest.importorskip("gymnasium")
IMAGE = np.random.default_rng(0).integers(0, (11, 6, 3), (7, 7, 3)).astype(np.uint8)


class Stand(gymnasium.Env):  # type: ignore[misc, type-arg]
    """What is like a grid of minigrid: it prints, is rewarded once at the fifth step, and sees the same every time."""

    action_space = gymnasium.spaces.Discrete(7)
    observation_space = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, (7, 7, 3), np.uint8), direction=gymnasium.spaces.Discrete(4)
    )

    def reset(self, **_: Any) -> Any:
        print("Sampling rejected: unreachable object")
        self.taken: list[Any] = []
        return {"image": IMAGE, "direction": 1}, {}

    def step(self, action: Any) -> Any:
        self.taken.append(action)
        done = len(self.taken) == 5
        return {"image": IMAGE, "direction": 1}, 0.9 * done, done, False, {}


class Bot:
    """Advises the number of actions that it has been told of, and fails after a 6, as where a box was opened."""

    def __init__(self, simulation: Any) -> None:
        self.told: list[Any] = []

    def replan(self, taken: Any) -> int:
        self.told += [] if taken is None else [taken]
        assert 6 not in self.told
        return len(self.told)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    """A grid with a bot, neither of which needs minigrid."""
    module = type("module", (), {"BabyAIBot": Bot})
    found = {"minigrid.utils.baby_ai_bot": module, "gymnasium": gymnasium}
    monkeypatch.setattr("cleangpt.environments.minigrid.require", found.__getitem__)
    return Grid(Stand())


def test_a_cell_is_one_number_of_kind_colour_and_state() -> None:
    ids = cell_ids(IMAGE)
    expected = [kind * 18 + colour * 3 + state for kind, colour, state in IMAGE.reshape(-1, 3).tolist()]
    assert ids.tolist() == expected and len({*map(tuple, IMAGE.reshape(-1, 3).tolist())}) == len({*expected})


def test_observations_are_ids_and_nothing_is_printed(grid: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    observation, _ = grid.reset(seed=1)
    assert grid.observation_space["image"].contains(observation["image"]) and observation["direction"] == 1
    assert convert(grid.observation_space).size == 50
    assert capsys.readouterr().out == ""


def test_the_bot_is_told_of_every_action_after_it_has_been_asked(grid: Grid) -> None:
    grid.reset()
    grid.step(3)
    assert bot(grid, None) == 0  # asked for the first time, in the state that there is
    grid.step(5)
    grid.step(4)
    assert bot(grid, None) == bot(grid, None) == 2 and grid._bot.told == [5, 4]
    grid.step(6)
    with pytest.raises(Lost):
        bot(grid, None)
    grid.reset()
    assert bot(grid, None) == 0


def test_a_reward_is_a_success(grid: Grid) -> None:
    grid.reset()
    assert [grid.step(0)[4]["success"] for _ in range(5)] == [False] * 4 + [True]


def test_an_episode_ends_where_the_expert_is_lost(grid: Grid) -> None:
    def policy(simulation: Any, observation: Any) -> int:
        return 6 if bot(simulation, observation) == 2 else 0

    observations, actions, rewards, own, terminated = record(grid, policy, 1)
    assert actions == [0, 0, 6] and len(observations) == 4 and rewards == [0.0] * 3 and own == [True] * 3
    assert not terminated

    def helpless(simulation: Any, observation: Any) -> int:
        raise Lost

    episode = demonstrate(grid, helpless, (convert(grid.observation_space), convert(grid.action_space)), 1)
    assert len(episode) == 0 == episode.total
    steps = Timesteps(TokenRanges(8), convert(grid.observation_space), convert(grid.action_space))
    assert steps.encode(*episode.steps(0, 0)).tokens.shape == (0, 52)


# With the package -----------------------------------------------------------------------------------------------------
def test_babyai_has_missions_and_its_bot_fulfils_them() -> None:
    pytest.importorskip("minigrid")
    name = "BabyAI-GoToLocal-v0"
    simulation, expert = make(name), find_expert(name)
    environment = Gymnasium(name, ModalityTokenizer(ByteTokenizer(), Modalities()))
    for seed in range(3):
        episode = demonstrate(simulation, expert, spaces(name), seed, noise=0.1)
        assert episode.text.startswith("go to ") and len(episode) > 0
        quiet = demonstrate(simulation, expert, spaces(name), seed)
        assert 0.5 < quiet.total <= 1 and quiet.terminated
    observation, _ = simulation.reset(seed=0)
    assert len(environment.steps.observe(environment.stack([observation])).tokens[0]) == 51


def test_pictures_of_a_grid_are_images() -> None:
    pytest.importorskip("minigrid")
    arguments = (("view", "pictures"),)
    observation, _ = make("BabyAI-GoToLocal-v0", arguments).reset(seed=0)
    seen = spaces("BabyAI-GoToLocal-v0", arguments, Modalities(image_height=56, image_width=56, image_tokens=49))[0]
    assert isinstance(seen, Dict) and dict(seen.parts)["image"] == Image(56, 56, 49)
    assert np.array_equal(seen.stack([observation])["image"][0], observation["image"])


def by_hand(image: Any, mission: list[int], sides: Any) -> Any:
    """Objects by distance from (3, 6), walls, and what is unseen, each with the ones of the mission, in plain loops.
    `sides` says those of a cell."""
    said = np.isin(np.arange(28), mission)
    vectors = []
    cells = [(x, y) for x in range(7) for y in range(7)]
    for x, y in sorted(cells, key=lambda cell: abs(cell[0] - 3) + 6 - cell[1]):
        kind, colour, state = image[x, y].tolist()
        if kind not in (0, 1, 2, 3):  # unseen, empty, wall, floor
            vector = np.zeros(50)
            vector[[kind, 11 + colour, 17 + state, 20 + x, 27 + y, 49]] = 1
            vector[34:38] = sides(x, y)
            vectors.append(vector)
    vectors = vectors[:8] + [np.zeros(50)] * (8 - len(vectors))
    for kind in (2, 0):
        vectors.append(np.array([image[x, y, 0] == kind for x, y in cells] + [False]))
    return np.concatenate([np.concatenate([vector, said]) for vector in vectors])


@pytest.mark.parametrize(
    ("mission", "things", "others"),
    [
        ("go to the red ball", [["red", "ball"], []], ["go"]),
        ("open a door", [["door"], []], ["open"]),
        ("pick up the grey key in front of you", [["grey", "key"], []], ["pick", "front"]),
        ("put the blue box next to the blue key", [["blue", "box"], ["blue", "key"]], ["put"]),
        ("go to the green object, then open the yellow door", [["green"], ["yellow", "door"]], ["go", "open"]),
        ("go to a ball and pick up a key and open the red door", [["ball"], ["key"]], ["go", "pick", "open"]),
        ("", [[], []], []),
    ],
)
def test_a_mission_is_told_by_what_it_names_in_order(mission: str, things: list[list[str]], others: list[str]) -> None:
    looks = ["red", "green", "blue", "purple", "yellow", "grey", "door", "key", "ball", "box"]
    words = ["go", "pick", "open", "put", "left", "right", "front", "behind"]
    expected = [look in thing for thing in things for look in looks] + [word in others for word in words]
    assert mission_numbers(mission).tolist() == expected


def test_colours_and_kinds_are_those_of_minigrid_in_its_order() -> None:
    constants = pytest.importorskip("minigrid.core.constants")
    assert sorted(constants.COLOR_TO_IDX, key=constants.COLOR_TO_IDX.get) == list(COLOUR_NAMES)
    assert [name for name in constants.OBJECT_TO_IDX if name in KIND_NAMES] == list(KIND_NAMES)


def test_objects_are_vectors_nearest_first_then_walls_and_what_is_unseen() -> None:
    few = np.where(np.arange(49).reshape(7, 7, 1) % 12 == 0, IMAGE, np.array([1, 0, 0])).astype(np.uint8)
    sides = np.random.default_rng(1).integers(0, 2, (49, 4))
    for image in (IMAGE, few):
        expected = by_hand(image, mission=[0, 8, 20], sides=lambda x, y: sides[x * 7 + y])
        assert np.array_equal(objects(image, "go to the red ball", sides), expected)
    assert sum(few[..., 0].reshape(-1) > 3) < 8 < sum(IMAGE[..., 0].reshape(-1) > 3)


def babyai_sides(simulation: Any, begun: Any, direction: int) -> Any:
    """Of a cell in the view, by BabyAI's rule for objects that are described by their place."""
    ahead = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[direction]
    right = np.array([-ahead[1], ahead[0]])

    def sides(x: int, y: int) -> Any:
        cells = [(i, j) for i in range(-9, 30) for j in range(-9, 30)]
        place = next(cell for cell in cells if simulation.get_view_coords(*cell) == (x, y))
        way = np.array(place) - begun
        return way @ right < 0, way @ right > 0, way @ ahead > 0, way @ ahead < 0

    return sides


def test_objects_of_a_grid_are_in_its_space_and_on_their_side_of_the_start() -> None:
    pytest.importorskip("minigrid")
    name, arguments = "BabyAI-PickupLoc-v0", (("view", "objects"),)
    simulation = make(name, arguments)
    seen = 0
    for seed in range(4):
        observation, _ = simulation.reset(seed=seed)
        plain = simulation.unwrapped
        begun, direction = np.array(plain.agent_pos), plain.agent_dir
        mission = np.flatnonzero(mission_numbers(observation["mission"])).tolist()
        for action in np.random.default_rng(seed).integers(0, 3, 12):
            sides = babyai_sides(plain, begun, direction)
            assert observation["image"] in simulation.observation_space["image"]
            assert np.array_equal(observation["image"], by_hand(plain.gen_obs()["image"], mission, sides))
            seen += int(observation["image"].reshape(10, 78)[:8, 34:38].sum())
            observation = simulation.step(action)[0]
    assert seen > 50
    modalities = Modalities(vector=78)
    steps = Timesteps(TokenRanges(8, modalities), *spaces(name, arguments, modalities))
    assert steps.size == 10 + 3  # the direction, the separator, and the action


@pytest.mark.parametrize(
    ("mission", "named"),
    [
        ("go to the red ball", [[6, 0]]),
        ("put the grey box next to the red ball", [[7, 5]]),
        ("open a door", [[4, 0], [4, 2]]),
        ("go to the red object, then open the blue door", [[4, 0], [6, 0]]),
        ("", []),
    ],
)
def test_goals_are_what_a_mission_names_first(mission: str, named: list[list[int]]) -> None:
    things = [[1, 0], [2, 5], [4, 0], [4, 2], [5, 1], [6, 0], [6, 4], [7, 5], [8, 1], [10, 0]]
    image = np.array([[[*thing, 1] for thing in things]], np.uint8)
    expected = [[8 if thing in named else thing[0], thing[1], 1] for thing in things]
    assert with_goals(image, mission).tolist() == [expected]
    assert image[0, :, 0].tolist() == [kind for kind, _ in things]


def test_the_bot_ends_where_a_goal_is_seen() -> None:
    pytest.importorskip("minigrid")
    name, arguments = "BabyAI-GoToLocal-v0", (("view", "goals"),)
    plain, simulation, expert = make(name), make(name, arguments), find_expert(name)
    for seed in range(5):
        cells = demonstrate(plain, expert, spaces(name), seed).observations
        seen = demonstrate(simulation, expert, spaces(name, arguments), seed).observations
        assert isinstance(cells, dict) and isinstance(seen, dict)
        goals = seen["image"] // 18 == 8
        assert goals[-1].any() and np.array_equal(seen["image"][~goals], cells["image"][~goals])


def test_another_view_is_refused() -> None:
    with pytest.raises(UserError, match=r"view is 'all' in .*; allowed: cells, goals, objects, pictures"):
        make("BabyAI-GoToLocal-v0", (("view", "all"),))


def test_without_minigrid_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "minigrid", None)
    with pytest.raises(UserError, match="pip install minigrid"):
        make("BabyAI-GoToLocal-v0")
