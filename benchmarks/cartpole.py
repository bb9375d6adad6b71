"""CartPole from nothing to 500 steps an episode: CPU time of `cartpole_ppo` beside stable-baselines3's PPO.

Both are whole processes of one thread, with their start, on three seeds in turn. Ours stops as soon as 20 episodes last
500 steps each. The peer takes 100,000 steps with the hyperparameters that its users tuned (rl-baselines3-zoo), and has
no need to stop. Their returns over 50 new episodes, which are not timed, stand in the row.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.resume import PROJECT, call
from benchmarks.runner import Row, Setup, interleave
from benchmarks.versions import cpu_time_of_children

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
    sides: dict[str, Callable[[int], Learned]] = {"ours": partial(train, setup.folder.resolve(), setup.quick)}
    if importlib.util.find_spec(PEER) is not None:
        sides["stable-baselines3"] = partial(train_peer, setup.quick)
    turns = {name: partial(next, map(side, seeds)) for name, side in sides.items()}
    taken = interleave(turns, len(seeds), warm_up=False)
    seconds = {name: [one.seconds for one in runs] for name, runs in taken.items()}
    returns = {name: ", ".join(f"{one.mean_return:.1f}" for one in runs) for name, runs in taken.items()}
    ours, what = seconds.pop("ours"), f"CartPole, mean returns {returns['ours']}"
    if not seconds:
        return [Row(what, "s", ours, "three minutes", [180.0] * len(seeds), 1.0)]
    return [Row(f"{what} (peer: {returns[name]})", "s", ours, name, theirs, 1.0) for name, theirs in seconds.items()]


def train(folder: Path, quick: bool, seed: int) -> Learned:
    """`cartpole_ppo`, and its score by `cleangpt evaluate`."""
    run, before = folder / f"seed{seed}", cpu_time_of_children()
    call(
        "cleangpt", "train", "cartpole_ppo", "--training.seed", str(seed), "--training.threads", "1",
        "--data.folder", str(folder / "data"), "--run-dir", str(run),
        *(["--training.macro-batches", "1", "--training.batches-per-macro-batch", "32"] if quick else []),
    )  # fmt: skip
    seconds = cpu_time_of_children() - before
    call("cleangpt", "evaluate", str(run))
    return Learned(seconds, float(json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["return"]))


def train_peer(quick: bool, seed: int) -> Learned:
    """The peer's PPO, in a process that prints its CPU time and what it scored."""
    command = [sys.executable, "-m", "benchmarks.cartpole", str(seed), str(2_000 if quick else STEPS)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT).stdout
    return Learned(*map(float, out.split()[-2:]))


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
    seconds = time.process_time()
    fresh = make_environments("CartPole-v1", n_envs=1, seed=seed + 1_000)
    return Learned(seconds, evaluate(model, fresh, n_eval_episodes=EPISODES)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*learn(int(sys.argv[1]), int(sys.argv[2])))
