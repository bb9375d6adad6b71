"""Games of the Arcade Learning Environment (Bellemare et al. 2013), and experts that read the machine's memory.

The package ale-py brings the games, under the GPL, and is needed where a simulation is made. An agent sees pictures.
"""

from typing import Any

from cleangpt.errors import require

BALL_X, BALL_Y, SPEED_Y, SPEED_X, PADDLE = 99, 101, 103, 105, 72
"""Where Breakout's memory of 128 bytes has the ball, its speed downwards and to the left, and the paddle."""
LEFT, RIGHT, FLOOR = 57, 199, 180
"""Between which columns the ball moves, and the line at which the paddle meets it."""
SLOPE = 0.87
"""Columns that the ball moves for each line, at equal speeds."""
HALF, NEAR = 8, 6
"""From the paddle's place to its middle, and how near to it a ball is met."""
NOOP, FIRE, MOVE_RIGHT, MOVE_LEFT = range(4)


def make_game(name: str, render_mode: str | None, **fields: Any) -> Any:
    """A game by its name, such as ALE/Breakout-v5; `fields` are its constructor's.

    Raises:
        UserError: ale-py is not installed.
    """
    gymnasium, games = require("gymnasium"), require("ale_py")
    games.ALEInterface.setLoggerMode(games.LoggerMode.Error)
    gymnasium.register_envs(games)
    return gymnasium.make(name, render_mode=render_mode, **fields)


def breakout(simulation: Any, observation: Any) -> int:
    """Moves the paddle to where the ball will come down, or follows it while it rises."""
    memory = simulation.unwrapped.ale.getRAM().astype(int)
    column, line = memory[BALL_X], memory[BALL_Y]
    if line == 0:
        return FIRE  # there is no ball
    down, left = signed(memory[SPEED_Y]), signed(memory[SPEED_X])
    target = reflected(column - SLOPE * left / down * (FLOOR - line)) if down > 0 else column
    distance = target - memory[PADDLE] - HALF
    return MOVE_RIGHT if distance > NEAR else MOVE_LEFT if distance < -NEAR else NOOP


def freeway(simulation: Any, observation: Any) -> int:
    """Walks on, whatever comes."""
    return 1


def signed(byte: int) -> int:
    """A byte as a number from -128 to 127."""
    return (byte + 128) % 256 - 128


def reflected(column: float) -> float:
    """Where a ball is that walls on both sides throw back."""
    width = RIGHT - LEFT
    beyond = (column - LEFT) % (2 * width)
    return LEFT + min(beyond, 2 * width - beyond)
