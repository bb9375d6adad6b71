"""The source of a policy's batches where it acts in simulations: rounds of steps with the current weights, and passes.

A row is a stretch of one episode: as many steps as fit into `data.seq_len`, fewer where the episode ends. Within it the
policy sees the steps before, so that training reads exactly what acting has read. Stretches that do not end with the
episode end with the next observation, whose value stands for the rewards that follow (Mnih et al. 2016, "Asynchronous
methods", section 4). All processes play the same episodes and each learns from its part of the rows. A simulation's
state is its seed and the actions since: a resumed run plays them again.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.data.records import ENDS, PlacedRecords, stack_rows
from cleangpt.data.shuffle import mix
from cleangpt.data.timesteps import Steps, join_records
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.acting import Acting
from cleangpt.environments.config import RolloutConfig
from cleangpt.environments.gymnasium import Gymnasium, item
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.gato import Gato
from cleangpt.models.head import TokenScores
from cleangpt.objectives.policy import PolicyObjective, Round
from cleangpt.objectives.ppo import PPO
from cleangpt.rollouts.agent import Agent, Context
from cleangpt.rollouts.rounds import Sizes, batch_of_round, explained_variance, means_of_rounds, read_position

WORTH = 100.0
"""Rewards are measured in points of the score: the expert's return is this much above that of random actions."""


@dataclass
class Simulation:
    """A simulation and how it came to its state."""

    env: Any
    number: int
    """Its place among the simulations."""
    episode: int = 0
    """How many it has begun before."""
    actions: list[list[int]] = field(default_factory=list)
    """The tokens of the actions in the current episode."""
    total: float = 0.0
    observation: Any = None


@dataclass
class Stretch:
    """A row: some steps of an episode, tokens and places, and what the policy did."""

    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    begun: int
    """Tokens before the first step."""
    logprobs: list[NDArray[np.float64]] = field(default_factory=list)
    """Of the tokens of each action, `(tokens,)`."""
    rewards: list[float] = field(default_factory=list)
    records: dict[str, PlacedRecords] = field(default_factory=dict)
    """Images and vectors at its tokens."""
    following: Steps | None = None
    """The observation after the last action; None: the episode has terminated, so that nothing follows."""


class ControlSource:
    """Batches of a policy's own steps.

    Args:
        config: `prompts` x `completions` rows in a round, `micro_batch_size` simulations at once.
        objective: PPO.
        environment: of the simulations.
        policy: acts.
        sizes: how rounds divide.
        seq_len: tokens per row.
        seed: of episodes and draws.
        ranks: the processes.
        device: of the policy.
        autocast: makes the context of forward passes.

    Raises:
        UserError: the objective or a field is not for simulations.
    """

    def __init__(
        self, config: RolloutConfig, objective: PolicyObjective, environment: Gymnasium, policy: LanguageModel,
        sizes: Sizes, *, seq_len: int, seed: int, ranks: Ranks, device: torch.device,
        autocast: AbstractContextManager[Any],
    ) -> None:  # fmt: skip
        if not isinstance(objective, PPO) or objective.kl_coef:
            raise UserError(
                f"objective is {type(objective).__name__} with kl_coef {objective.kl_coef}; allowed in simulations: "
                "PPO, without a KL term"
            )
        if config.save_answers:
            raise UserError("rollouts.save_answers is True; allowed in simulations: False, since there are no answers")
        self.config, self.objective, self.environment, self.policy = config, objective, environment, policy
        self.sizes, self.seq_len, self.seed, self.ranks = sizes, seq_len, seed, ranks
        self.device, self.autocast, self.steps = device, autocast, environment.steps
        self.acting = Acting(
            numbers="sample", choices="sample", temperature=config.temperature,
            see_actions=environment.acting.see_actions,
        )  # fmt: skip
        if isinstance(policy, Gato):
            ids = self.steps.action.ids(self.steps.ranges, action=True)
            policy.scored_ids = min(one.first for one in ids), max(one.end for one in ids)
        self.samples = 0
        """Consumed so far, over all devices."""
        self.wait_time = 0.0
        """Seconds spent on rollouts since the start."""
        self.steps_taken = 0
        """Steps of simulations so far."""
        self.record_names = [part for name in self.steps.records for part in (name, name + ENDS)]
        """Inputs of the model that are images and vectors."""
        self.rows: dict[str, Tensor] = {}
        self.rounds: list[dict[str, float]] = []
        self.finished: list[tuple[float, int]] = []
        """Return and length of the episodes that ended in this round."""
        size = min(config.micro_batch_size, config.answers)
        if config.answers % size:
            raise UserError(
                f"rollouts.micro_batch_size is {size}; allowed in simulations: a divisor of the {config.answers} rows "
                "of a round, rollouts.prompts x rollouts.completions"
            )
        self.simulations = [Simulation(environment.make(), number) for number in range(size)]
        for simulation in self.simulations:
            self._reset(simulation, 0)

    # Batches ----------------------------------------------------------------------------------------------------------
    def next(self) -> Batch:
        """This device's part of the next batch; begins a round if the last is used up."""
        began = time.perf_counter()
        if self.samples % self.config.samples == 0:
            self._begin_round(self.samples // self.config.samples)
        batch = batch_of_round(
            self.rows, self.samples, self.config, self.sizes, self.seed, self.ranks, inputs=("tokens", "places"),
            records=self.record_names,
        )  # fmt: skip
        self.samples += self.sizes.batch_size
        self.wait_time += time.perf_counter() - began
        return batch

    # Rounds -----------------------------------------------------------------------------------------------------------
    def _begin_round(self, number: int) -> None:
        """Plays the round's steps and computes everything about them that needs no gradient."""
        if number % self.sizes.rounds_per_macro_batch == 0:
            self.rounds = []
        training, stretches, self.finished = self.policy.training, list[Stretch](), []
        self.policy.eval()
        with self.autocast:
            for wave in range(self.config.answers // len(self.simulations)):
                stretches += self._play(mix(self.seed, number, wave))
            columns = self._columns(stretches)
            values = self._values(columns)
        mask, rows, last = columns["mask"], torch.arange(len(stretches)), columns["last"]
        assert isinstance(self.objective, PPO)
        following = values[rows, columns["read"]] * columns["goes_on"]
        columns["rewards"][rows, last] += self.objective.gamma * following
        rollouts = Round(mask, columns["rewards"], columns["logprobs"], 1, values=values * mask)
        extras = self.objective.estimate(rollouts)
        extras["old_logprobs"] = rollouts.logprobs
        self.rounds.append(self._measure(rollouts, extras))
        kept = {name: column.float() for name, column in extras.items()}
        self.rows = {"tokens": columns["tokens"].int(), "places": columns["places"].int(), "mask": mask} | kept
        self.rows |= {name: columns[name] for name in self.record_names}
        self.policy.train(training)

    def _play(self, seed: int) -> list[Stretch]:
        """A stretch in every simulation, all in step."""
        contexts = [Context.of(self.environment.read_text(one.observation)) for one in self.simulations]
        seeds = [mix(seed, one.number) for one in self.simulations]
        agent = Agent(self.policy, self.device, self.steps, self.acting, contexts, seeds)
        longest = (self.seq_len - int(agent.begun.max()) - self.steps.observation_size) // self.steps.size
        stretches = [Stretch(context.tokens, context.places, len(context.tokens)) for context in contexts]
        running = list(range(len(self.simulations)))
        for step in range(max(1, longest)):
            if not running:
                break
            last = step + 1 >= longest
            seen = self.environment.stack([self.simulations[number].observation for number in running])
            actions, going = agent.act(seen), list[int]()
            for row, number in enumerate(running):
                end = int(agent.lengths[row])
                stretch, tokens = stretches[number], agent.tokens[row, :end]
                stretch.logprobs.append(agent.logprobs[row])
                stretch.tokens, stretch.places = tokens.copy(), agent.places[row, :end].copy()
                stretch.records = agent.records[row]
                if self._step(self.simulations[number], stretch, item(actions, row), last):
                    going.append(row)
            running = [running[row] for row in going]
            if len(going) < len(agent.lengths):
                agent.keep(going)
        return stretches

    def _step(self, simulation: Simulation, stretch: Stretch, action: Any, last: bool) -> bool:
        """Acts; returns whether the stretch goes on. It does not after its `last` step, nor after its episode's, where
        another one begins."""
        simulation.actions.append(stretch.tokens[-self.steps.action.size :].tolist())
        simulation.observation, reward, terminated, truncated, _ = simulation.env.step(action)
        simulation.total += float(reward)
        stretch.rewards.append(float(reward))
        self.steps_taken += 1
        if (last or truncated) and not terminated:
            stretch.following = self.steps.observe(self.environment.stack([simulation.observation]))
        if terminated or truncated:
            self.finished.append((simulation.total, len(simulation.actions)))
            self._reset(simulation, simulation.episode + 1)
        return not (terminated or truncated or last)

    def _reset(self, simulation: Simulation, episode: int) -> None:
        """Begins an episode, whose number counts those of this simulation."""
        simulation.episode, simulation.actions, simulation.total = episode, [], 0.0
        seed = mix(self.seed, simulation.number, episode) % 2**31
        simulation.observation, _ = simulation.env.reset(seed=seed)

    def _columns(self, stretches: Sequence[Stretch]) -> dict[str, Tensor]:
        """Stretches as tensors.

        Returns:
            `tokens` and `places` `(rows, seq + 1)`; aligned with the targets, the tokens from the second on
            `(rows, seq)`: `mask`, `logprobs` and `rewards`; of each row `(rows,)`: `last`, the column of its last
            action, `read`, that of the last token, after which the value is what follows, and `goes_on`, whether
            anything does; images, vectors and their ends, as in a batch.
        """
        width = self.seq_len + 1
        whole = [np.zeros((len(stretches), width), np.int64) for _ in range(2)]
        mask = np.zeros((len(stretches), width), bool)
        logprobs, rewards = (np.zeros((len(stretches), width)) for _ in range(2))
        last, read = (np.zeros(len(stretches), np.int64) for _ in range(2))
        size, acted = self.steps.size, self.steps.action.size
        records = list[dict[str, Tensor]]()
        scale = WORTH / (self.environment.expert_return - self.environment.random_return)
        for row, stretch in enumerate(stretches):
            parts = [(stretch.tokens, stretch.places)]
            if stretch.following is not None:
                parts.append((stretch.following.tokens[0], stretch.following.places[0]))
            records.append(_records_of(stretch))
            for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                joined = np.concatenate(pieces)
                column[row, : len(joined)], read[row] = joined, len(joined) - 1
            for step, (scores, reward) in enumerate(zip(stretch.logprobs, stretch.rewards, strict=True)):
                end = stretch.begun + (step + 1) * size
                mask[row, end - acted : end], logprobs[row, end - acted : end] = True, scores
                rewards[row, end - 1], last[row] = reward * scale, end - 2
        columns = {
            "tokens": whole[0], "places": whole[1], "mask": mask[:, 1:], "logprobs": logprobs[:, 1:],
            "rewards": rewards[:, 1:], "last": last, "read": np.minimum(read, self.seq_len - 1),
            "goes_on": np.array([float(stretch.following is not None) for stretch in stretches]),
        }  # fmt: skip
        found = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        return found | stack_rows(records)

    @torch.no_grad()
    def _values(self, columns: dict[str, Tensor]) -> Tensor:
        """The value after each token `(rows, seq)`, float64, on the host."""
        parts = []
        for start in range(0, len(columns["tokens"]), self.config.micro_batch_size):
            rows = slice(start, start + self.config.micro_batch_size)
            inputs = {name: columns[name][rows, :-1].contiguous() for name in ("tokens", "places")}
            inputs |= {name: columns[name][rows] for name in self.record_names}
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            scores = cast(TokenScores, self.policy(**inputs, scores=["value"]))
            parts.append(scores.heads["value"].double().cpu())
        return torch.cat(parts)

    # Metrics ----------------------------------------------------------------------------------------------------------
    def _measure(self, rollouts: Round, extras: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of a round; all are of the policy that played it."""
        mask = rollouts.mask
        found = {
            "entropy": float(-(rollouts.logprobs * mask).sum() / mask.sum()),
            "explained_variance": explained_variance(extras["returns"], extras["old_values"], mask),
        }
        if self.finished:
            returns, lengths = zip(*self.finished, strict=True)
            found |= {"return": float(np.mean(returns)), "episode_length": float(np.mean(lengths))}
        return found

    def metrics(self) -> dict[str, float]:
        """Means over the rounds of the macro-batch so far, and the steps of simulations since the start."""
        return {"train_environment_steps": float(self.steps_taken), **means_of_rounds(self.rounds)}

    # State ------------------------------------------------------------------------------------------------------------
    def skip(self, start: int, end: int) -> None:
        """Does nothing: after a roll-back the policy acts again, from other weights."""

    def state_dict(self) -> dict[str, Any]:
        """The positions, how the simulations came to their states, and within a round its columns."""
        within = self.samples % self.config.samples != 0
        return {
            "samples": self.samples,
            "steps_taken": self.steps_taken,
            "rounds": self.rounds,
            "rows": self.rows if within else {},
            "simulations": [[one.episode, one.actions] for one in self.simulations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`: the simulations play their episodes again up to where they were.

        Raises:
            ValueError: a number in it is not a position, or there are other simulations.
        """
        self.samples, self.steps_taken = read_position(state, "samples"), read_position(state, "steps_taken")
        self.rounds, self.rows = list(state["rounds"]), dict(state["rows"])
        for simulation, (episode, actions) in zip(self.simulations, state["simulations"], strict=True):
            self._reset(simulation, int(episode))
            for tokens in actions:
                simulation.observation, reward, *_ = simulation.env.step(self.environment.action(tokens))
                simulation.total += float(reward)
                simulation.actions.append([int(token) for token in tokens])

    def close(self) -> None:
        """Closes the simulations."""
        for simulation in self.simulations:
            simulation.env.close()


def _records_of(stretch: Stretch) -> dict[str, Tensor]:
    """The images and vectors of a stretch and of what follows, and their ends, by name."""
    parts = [(stretch.records, len(stretch.tokens))]
    if stretch.following is not None:
        parts.append((stretch.following.placed(), stretch.following.tokens.size))
    inputs: dict[str, Tensor] = {}
    for name, records in join_records(parts).items():
        inputs |= records.inputs(name)
    return inputs
