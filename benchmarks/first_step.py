"""The command `cleangpt` up to the end of its first training step: `python -m benchmarks.first_step train ...`."""

import os
import sys
from unittest.mock import patch

from cleangpt.commands import main
from cleangpt.training.trainer import Trainer

step = Trainer.step


def first_step(trainer: Trainer) -> None:
    """Takes one step, then ends the process at once, without saving."""
    step(trainer)
    os._exit(0)


if __name__ == "__main__":
    with patch.object(Trainer, "step", first_step):
        code = main()
    sys.exit(code or "no step was taken")
