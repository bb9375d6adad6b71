"""The command `cleangpt`, killed by SIGKILL after a number of steps: `python -m benchmarks.gpu.killed 30 train ...`."""

import os
import signal
import sys
from unittest.mock import patch

from cleangpt.commands import main
from cleangpt.training.trainer import Trainer

step = Trainer.step


def killing(steps: int) -> object:
    """A step of the trainer that is its process's last, at the given number of steps."""

    def step_and_die(trainer: Trainer) -> None:
        step(trainer)
        if trainer.position.step == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    return step_and_die


if __name__ == "__main__":
    with patch.object(Trainer, "step", killing(int(sys.argv[1]))):
        sys.exit(main(sys.argv[2:]))
