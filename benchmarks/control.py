"""An agent in Pendulum: CPU time of a step by the number of simulations, the model's share of it, and memory.

The model is that of `control_demo`, 2 layers, 64 wide, with random weights. Pendulum is always cut off by its limit, so
that all episodes are equally long; a step is five tokens, and an episode outgrows the context of 96 many times. The
plain loop plays one simulation by the same model, and reads its whole context again for every action. Memory is the
peak of a fresh process that plays 20 episodes in step.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.machine import peak_resident_bytes
from benchmarks.made import shipped
from benchmarks.runner import Row, Setup, cpu_seconds, interleave, one_thread
from cleangpt.data.modalities import Modalities
from cleangpt.data.timesteps import NO_PLACE
from cleangpt.data.tokenizers import ByteTokenizer, ModalityTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.environments.gymnasium import Gymnasium
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.simulating import play_control

BATCH = 20
"""Simulations in step."""
GOAL = 1 / 10
"""Of the CPU time of a step in 20 simulations, against the plain loop."""
MEMORY_GOAL = 1.05
CPU = torch.device("cpu")


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    with one_thread():
        return [*speed_rows(setup), memory_row(setup)]


def simulated(steps: int) -> Gymnasium:
    """The task, with episodes of this many steps."""
    return Gymnasium(
        "Pendulum-v1", ModalityTokenizer(ByteTokenizer(), Modalities()), (("max_episode_steps", steps),),
        Acting(see_actions=False), expert_return=-150.0, random_return=-1500.0,
    )  # fmt: skip


def agent() -> LanguageModel:
    """The model."""
    torch.manual_seed(0)
    experiment = shipped("control_demo")
    vocab_size = simulated(1).tokenizer.vocab_size
    return build_model(experiment.model.resolved(vocab_size, experiment.data.seq_len)).eval()


def speed_rows(setup: Setup) -> list[Row]:
    """A step in 20 simulations and in one against the plain loop, and how much of it the model takes."""
    model, steps = agent(), 4 if setup.quick else 200
    environment, inside = simulated(steps), Clock(model)
    play = partial(play_control, model, environment, "val", device=CPU)

    def timed(count: int) -> tuple[float, float]:
        inside.seconds = 0.0
        return cpu_seconds(lambda: play(tasks=range(count))) / steps / count, inside.seconds / steps / count

    plain = "plain loop"
    measures: dict[str, Callable[[], tuple[float, float]]] = {
        str(BATCH): partial(timed, BATCH),
        "1": partial(timed, 1),
        plain: lambda: (cpu_seconds(lambda: plain_loop(model, environment, steps)) / steps, 0.0),
    }
    taken = interleave(measures, setup.repetitions)
    whole = {name: [seconds for seconds, _ in pairs] for name, pairs in taken.items()}
    rows = [
        Row(f"a step, {count} in step" if count > 1 else "a step, one simulation", "s", whole[str(count)], plain,
            whole[plain], GOAL if count > 1 else None)
        for count in (BATCH, 1)
    ]  # fmt: skip
    return rows + [
        Row(f"the model's part of it, {name} in step", "s", [part for _, part in taken[name]], "the step", whole[name])
        for name in (str(BATCH), "1")
    ]


class Clock:
    """Adds up the CPU seconds that a model's forward passes take."""

    def __init__(self, model: LanguageModel) -> None:
        self.seconds = 0.0
        model.register_forward_pre_hook(lambda *_: self.add(-time.process_time()))
        model.register_forward_hook(lambda *_: self.add(time.process_time()))

    def add(self, seconds: float) -> None:
        """Adds seconds, or those until the next call."""
        self.seconds += seconds


@torch.no_grad()
def plain_loop(model: LanguageModel, environment: Gymnasium, count: int) -> int:
    """Plays one simulation without a cache, as one would write it down; returns the tokens that were read."""
    steps, simulation, read = environment.steps, environment.make(), 0
    allowed = steps.action.ids(steps.ranges, action=True)[0]
    observation, _ = simulation.reset(seed=0)
    tokens, places = np.zeros((1, 0), np.int64), np.zeros((1, 0), np.int64)
    for _ in range(count):
        seen = steps.observe(environment.stack([observation]))
        whole = (model.max_seq_len - seen.tokens.shape[1]) // steps.size * steps.size
        tokens = np.concatenate([tokens[:, -whole:], seen.tokens], axis=1)
        places = np.concatenate([places[:, -whole:], seen.places], axis=1)
        logits = model(torch.from_numpy(tokens), places=torch.from_numpy(places))[0, -1]
        mean = logits[allowed.first : allowed.end].double().softmax(-1).numpy() @ steps.ranges.bin_values()
        action = np.array([[allowed.first]]) + steps.ranges.to_bins(np.array([[mean]]))
        observation, *_ = simulation.step(environment.action(action[0].tolist()))
        read += tokens.shape[1]
        tokens = np.concatenate([tokens, action], axis=1)
        places = np.concatenate([places, np.full((1, 1), NO_PLACE)], axis=1)
    simulation.close()
    return read


def memory_row(setup: Setup) -> Row:
    """A process that plays long episodes against one that plays short ones."""
    short, long = (4, 8) if setup.quick else (500, 2_000)
    measures = {str(steps): partial(peak_memory, steps) for steps in (long, short)}
    taken = interleave(measures, 1 if setup.quick else 3, warm_up=False)
    what = f"memory of a process that plays {BATCH} episodes of {long:,} steps"
    return Row(what, "B", taken[str(long)], f"of {short}", taken[str(short)], None if setup.quick else MEMORY_GOAL)


def peak_memory(steps: int) -> float:
    """Bytes of a fresh process that plays 20 episodes of this many steps."""
    command = [sys.executable, "-m", "benchmarks.control", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    play_control(agent(), simulated(int(sys.argv[1])), "val", range(BATCH), CPU)
    print(peak_resident_bytes())
