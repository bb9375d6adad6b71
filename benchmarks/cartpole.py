"""CartPole from nothing to 500 steps an episode: CPU time of `cartpole_ppo` beside stable-baselines3's PPO.

Both are whole processes of one thread, with their start, on three seeds in turn. Ours stops as soon as 20 episodes last
500 steps each. The peer takes 100,000 steps with the hyperparameters that its users tuned (rl-baselines3-zoo), and has
no need to stop. Their returns over 50 new episodes, which are not timed, stand in the row.
"""

import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.runner import Row, Setup, interleave

SEEDS = (1, 2, 3)
STEPS = 100_000
EPISODES = 50
PEER = "stable_baselines3"


class Learned(NamedTuple):
    """What a process came to."""

    seconds: float
    """Of CPU time."""
    mean_return: float


def run(setup: Setup) -> list[Row]:
    """The row of the benchmark; without the peer its place is taken by the three minutes that are allowed."""
    seeds = SEEDS[: 1 if setup.quick else None]
    ours: dict[str, Callable[[], list[Learned]]] = {
        "ours": lambda: [train(setup.folder / f"seed{seed}", seed, setup.quick) for seed in seeds]
    }
    if importlib.util.find_spec(PEER) is not None:
        ours[PEER] = lambda: [train_peer(seed, setup.quick) for seed in seeds]
    taken = {name: runs[0] for name, runs in interleave(ours, 1, warm_up=False).items()}
    returns = {name: ", ".join(f"{one.mean_return:.1f}" for one in runs) for name, runs in taken.items()}
    seconds = {name: [one.seconds for one in runs] for name, runs in taken.items()}
    what = f"CartPole, mean returns {returns['ours']}"
    if PEER not in taken:
        return [Row(what, "s", seconds["ours"], "three minutes", [180.0] * len(seeds), 1.0)]
    return [Row(f"{what} (peer: {returns[PEER]})", "s", seconds["ours"], "stable-baselines3", seconds[PEER], 1.0)]


def train(folder: Path, seed: int, quick: bool) -> Learned:
    """`cartpole_ppo`, and its score by `cleangpt evaluate`."""
    command = [sys.executable, "-m", "cleangpt"]
    words = ["--training.seed", str(seed), "--data.folder", str(folder.parent / "data"), "--run-dir", str(folder)]
    short = ["--training.macro-batches", "1", "--training.batches-per-macro-batch", "32"] if quick else []
    seconds = timed([*command, "train", "cartpole_ppo", *words, *short])[0]
    timed([*command, "evaluate", str(folder)])
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return Learned(seconds, float(found["return"]))


def train_peer(seed: int, quick: bool) -> Learned:
    """The peer's PPO, in a process that prints its CPU time and what it scored."""
    out = timed([sys.executable, "-m", "benchmarks.cartpole", str(seed), str(2_000 if quick else STEPS)])[1]
    return Learned(*map(float, out.split()[-2:]))


def timed(command: Sequence[str]) -> tuple[float, str]:
    """CPU seconds of a process of one thread, and what it printed.

    Raises:
        RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def learn(seed: int, steps: int) -> Learned:
    """Trains the peer; hyperparameters are facts from rl-baselines3-zoo, hyperparams/ppo.yml, CartPole-v1."""
    sb3: Any = importlib.import_module(PEER)
    make_environments: Any = importlib.import_module(f"{PEER}.common.env_util").make_vec_env
    evaluate: Any = importlib.import_module(f"{PEER}.common.evaluation").evaluate_policy
    environments = make_environments("CartPole-v1", n_envs=8, seed=seed)

    def falling(start: float, left: float) -> float:
        return start * left

    model = sb3.PPO(
        "MlpPolicy", environments, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, ent_coef=0.0,
        learning_rate=partial(falling, 0.001), clip_range=partial(falling, 0.2), seed=seed, device="cpu",
    )  # fmt: skip
    model.learn(steps)
    used = resource.getrusage(resource.RUSAGE_SELF)
    fresh = make_environments("CartPole-v1", n_envs=1, seed=seed + 1_000)
    return Learned(used.ru_utime + used.ru_stime, evaluate(model, fresh, n_eval_episodes=EPISODES)[0])


if __name__ == "__main__":
    print(*learn(int(sys.argv[1]), int(sys.argv[2])))
