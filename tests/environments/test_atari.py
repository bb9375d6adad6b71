"""Games of Atari: where a ball comes down, and experts that read the machine's memory."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.modalities import Image, Modalities
from cleangpt.environments import atari
from cleangpt.environments.experts import find_expert, record
from cleangpt.environments.gymnasium import make, spaces
from cleangpt.errors import UserError

pytest.importorskip("gymnasium")


def machine(**bytes_: int) -> Any:
    """A game whose memory has these bytes."""
    memory = np.zeros(128, np.uint8)
    for name, byte in bytes_.items():
        memory[getattr(atari, name)] = byte % 256
    return SimpleNamespace(unwrapped=SimpleNamespace(ale=SimpleNamespace(getRAM=lambda: memory)))


@given(st.floats(-1000, 1000), st.integers(57, 199))
def test_a_ball_between_walls_is_where_it_is_after_every_bounce(travelled: float, start: int) -> None:
    place, step = float(start), travelled / 1000
    for _ in range(1000):  # bounce for bounce
        place += step
        if not 57 <= place <= 199:
            place, step = (2 * 57 if place < 57 else 2 * 199) - place, -step
    assert atari.reflected(start + travelled) == pytest.approx(place, abs=1e-6)


def test_a_byte_above_127_is_negative() -> None:
    assert [atari.signed(byte) for byte in (0, 1, 127, 128, 255)] == [0, 1, 127, -128, -1]


def test_breakout_serves_and_meets_the_ball_where_it_will_come_down() -> None:
    assert atari.breakout(machine(), None) == atari.FIRE
    falling = {"BALL_X": 120, "BALL_Y": 80, "SPEED_Y": 1}
    assert atari.breakout(machine(**falling, PADDLE=112), None) == atari.NOOP
    assert atari.breakout(machine(**falling, SPEED_X=-1, PADDLE=112), None) == atari.MOVE_RIGHT  # 87 columns on
    assert atari.breakout(machine(**falling, SPEED_X=1, PADDLE=112), None) == atari.MOVE_LEFT
    assert atari.breakout(machine(**falling, SPEED_X=-1, PADDLE=183), None) == atari.NOOP  # bounced at 199
    rising = falling | {"SPEED_Y": -1, "SPEED_X": -2}
    assert atari.breakout(machine(**rising, PADDLE=112), None) == atari.NOOP, "it follows"


def test_without_ale_py_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ale_py", None)
    with pytest.raises(UserError, match="pip install ale-py"):
        make("ALE/Breakout-v5")


# With the package -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "least", "actions"), [("ALE/Breakout-v5", 20, 4), ("ALE/Freeway-v5", 20, 3)])
def test_experts_win_what_random_actions_do_not(name: str, least: float, actions: int) -> None:
    pytest.importorskip("ale_py")
    simulation, expert = make(name), find_expert(name)
    seen = spaces(name, modalities=Modalities(image_height=84, image_width=84, image_tokens=36))[0]
    assert seen == Image(84, 84, 36) and simulation.action_space.n == actions
    _, _, rewards, _, _ = record(simulation, expert, 1)
    _, _, chance, _, _ = record(simulation, expert, 1, noise=1.0)
    assert sum(rewards) >= least > 5 > sum(chance)
