"""The source of a policy's batches: rounds of rollouts with the current weights, and passes over them.

A round is `rollouts.prompts` x `rollouts.completions` answers. Answer `id` = prompt position x completions + place in
the group, counted from the start of the run over all devices, and the draw of its token t is a function of (seed, id,
t), so rollouts do not depend on how many devices share them. Between two updates a round is data: after a kill in its
middle a resumed run goes on with the round that its snapshot has.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.config import RolloutConfig
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.policy import PolicyObjective, Round
from cleangpt.objectives.ppo import PPO
from cleangpt.rollouts.answers import as_columns
from cleangpt.rollouts.collecting import Collected, Collector
from cleangpt.rollouts.reference import ReferenceModel
from cleangpt.rollouts.rounds import Sizes, batch_of_round, explained_variance, means_of_rounds, read_position
from cleangpt.tracking.metrics import metric_key

Save = Callable[[Sequence[Mapping[str, Any]]], None]
"""Writes the answers of a round, of which each is a line of answers.jsonl."""


class RolloutSource:
    """Batches of a policy's own answers; all processes call it together.

    Its state is the number of samples consumed and of prompts drawn, which dynamic sampling makes another number, and
    within a round the round itself.
    """

    def __init__(
        self, config: RolloutConfig, objective: PolicyObjective, collector: Collector, policy: LanguageModel,
        reference: ReferenceModel | None, sizes: Sizes, *, seed: int, ranks: Ranks, device: torch.device,
        autocast: AbstractContextManager[Any], save: Save | None = None,
    ) -> None:  # fmt: skip
        self.config, self.objective, self.collector, self.policy = config, objective, collector, policy
        self.reference, self.sizes, self.seed, self.ranks = reference, sizes, seed, ranks
        self.device, self.autocast, self.save = device, autocast, save
        self.samples = 0
        """Consumed so far, over all devices."""
        self.prompts = 0
        """Prompts drawn so far."""
        self.kl_coef = objective.kl_coef
        self.skipped_ranges: list[list[int]] = []
        """Ranges of samples left out after a spike of the loss; the prompts of as many answers are not drawn."""
        self.rows: dict[str, Tensor] = {}
        """The columns of the round in progress, one row per answer; empty before the first."""
        self.rounds: list[dict[str, float]] = []
        """The metrics of the macro-batch's rounds."""
        self.examples: list[str] = []
        """Some answers of the last round, as text, with their rewards."""
        self.wait_time = 0.0
        """Seconds spent on rollouts since the start."""
        self._learning = [0, 0.0]
        self._left: float | None = None

    # Batches ----------------------------------------------------------------------------------------------------------
    def next(self) -> Batch:
        """This device's part of the next batch; begins a round if the last is used up."""
        began = time.perf_counter()
        place = self.samples % self.config.samples
        if place and self._left is not None:
            self._learning[0] += self._tokens_per_batch()
            self._learning[1] += began - self._left
        if place == 0:
            self._begin_round(self.samples // self.config.samples)
        batch = batch_of_round(self.rows, self.samples, self.config, self.sizes, self.seed, self.ranks)
        self.samples += self.sizes.batch_size
        self._left = time.perf_counter()
        self.wait_time += self._left - began
        return batch

    def _tokens_per_batch(self) -> float:
        return int(self.rows["mask"].sum()) / len(self.rows["mask"]) * self.sizes.batch_size

    # Rounds -----------------------------------------------------------------------------------------------------------
    def _begin_round(self, number: int) -> None:
        """Draws the round's answers and computes everything about them that needs no gradient."""
        if number % self.sizes.rounds_per_macro_batch == 0:
            self.rounds, self._learning = [], [0, 0.0]
        began, training = time.perf_counter(), self.policy.training
        self.policy.eval()
        skipped = sum(end - start for start, end in self.skipped_ranges) // self.config.passes
        with self.autocast:
            collected = self.collector.collect(self.prompts + -(-skipped // self.config.completions))
        self.prompts += collected.prompts
        if self.save is not None:
            step = self.samples // (self.sizes.batch_size * self.sizes.accumulation) + 1
            self.save([{"step": step, **line} for line in map(self.collector.line, collected.answers)])
        sampled_in = time.perf_counter() - began
        columns = as_columns(collected.answers)
        rollouts = Round(columns["mask"], columns["rewards"], columns["logprobs"], self.config.completions)
        importance = self._look_back(columns["tokens"], rollouts)
        metrics = self._measure(collected, rollouts) | {
            "sampled_tokens_per_second": sum(answer.length for answer in collected.answers) / sampled_in
        }
        self.rows = {"tokens": columns["tokens"].int(), "mask": rollouts.mask}
        extras = self.objective.estimate(rollouts)
        extras["old_logprobs"] = rollouts.logprobs
        if rollouts.reference is not None:
            extras["reference_logprobs"] = rollouts.reference
        if "returns" in extras:
            metrics["explained_variance"] = explained_variance(extras["returns"], extras["old_values"], rollouts.mask)
        if importance is not None:
            extras["advantages"] = extras["advantages"] * importance
        self.rows |= {name: column.float() for name, column in extras.items()}
        if isinstance(self.objective, PPO):
            metrics["kl_coef"] = self.kl_coef
            self.kl_coef = self.objective.next_kl_coef(self.kl_coef, metrics.get("kl", 0.0), self.config.answers)
        self.rounds.append(metrics)
        self.examples = collected.examples
        self.policy.train(training)

    def _look_back(self, tokens: Tensor, rollouts: Round) -> Tensor | None:
        """Fills in what forward passes say about the answers: log-probabilities of trainer and reference, values.

        Returns:
            Truncated importance weights `(rows, seq)` to multiply advantages with. They are positive, so they multiply
            a clipped loss likewise. None: none are wanted.
        """
        mask, importance = rollouts.mask, None
        recomputed = self.config.old_logprobs == "recomputed"
        if recomputed or "value" in self.objective.heads:
            found = self._scores(self.policy, tokens, mask, sorted(self.objective.heads))
            if "value" in found:
                rollouts.values = found["value"] * mask
            if recomputed:
                if (cap := self.config.importance_cap) is not None:
                    importance = (found["logprobs"] - rollouts.logprobs).exp().clamp(max=cap)
                rollouts.logprobs = found["logprobs"]
        if self.reference is not None:
            rollouts.reference = self.reference.call(lambda model: self._scores(model, tokens, mask, [])["logprobs"])
        rollouts.kl_coef = self.kl_coef
        return importance

    @torch.no_grad()
    def _scores(self, model: LanguageModel, tokens: Tensor, mask: Tensor, heads: list[str]) -> dict[str, Tensor]:
        """Log-probabilities of the answers' tokens and outputs of heads `(rows, seq)`, float64, on the host.

        Each device computes a part, in chunks of `micro_batch_size` rows.
        """
        targets = torch.where(mask, tokens[:, 1:], IGNORED)
        share, size = len(tokens) // self.ranks.world_size, self.config.micro_batch_size
        first = self.ranks.rank * share
        parts: list[dict[str, Tensor]] = []
        for start in range(first, first + share, size):
            rows = slice(start, min(start + size, first + share))
            inputs, expected = tokens[rows, :-1].contiguous().to(self.device), targets[rows].to(self.device)
            with self.autocast:
                scores = cast(TokenScores, model(inputs, targets=expected, scores=heads))
            found = {"logprobs": scores.logprobs} | scores.heads
            parts.append({name: score.double().cpu() for name, score in found.items()})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        gathered = self.ranks.all_gather(joined)
        return {name: torch.cat([part[name] for part in gathered]) for name in joined}

    # Metrics ----------------------------------------------------------------------------------------------------------
    def _measure(self, collected: Collected, rollouts: Round) -> dict[str, float]:
        """The metrics of a round; all are of the policy that sampled it."""
        scored, mask = [answer for answer in collected.answers if answer.scored], rollouts.mask
        answers = scored or collected.answers
        totals = np.array([sum(answer.total) for answer in answers])
        lengths = np.array([answer.length for answer in answers])
        better = totals > totals.mean()
        metrics = {
            "reward": totals.mean(),
            "reward_std": totals.std(),
            "best_reward": collected.best_reward,
            "answer_length": lengths.mean(),
            "unscored_share": 1 - len(scored) / len(collected.answers),
            "truncated_share": np.mean([answer.truncated for answer in answers]),
            "groups_without_signal": collected.without_signal,
            "draws": collected.prompts / self.config.prompts,
            "reward_errors": collected.errors,
            # The mean of -log π over sampled tokens is an unbiased estimate of the entropy.
            "entropy": float(-(rollouts.logprobs * mask).sum() / mask.sum().clamp(min=1)),
        }
        if self.config.dynamic_sampling:
            metrics["drawn_reward"] = collected.drawn_reward
        if better.any():
            metrics |= {"length_of_better": lengths[better].mean(), "length_of_worse": lengths[~better].mean()}
        for name in dict.fromkeys(name for answer in answers for name in answer.rewards):
            given = [sum(rewards) for answer in answers if (rewards := answer.rewards.get(name))]
            if given:
                metrics[metric_key("reward", name)] = np.mean(given)
        if rollouts.reference is not None:
            d = (rollouts.logprobs - rollouts.reference) * mask
            rows = rollouts.counted.sum().clamp(min=1)
            metrics |= {"kl": float(d.sum() / rows), "kl_k3": float(((-d).exp() - 1 + d).sum() / rows)}
        return {name: float(value) for name, value in metrics.items()}

    def metrics(self) -> dict[str, float]:
        """Means over the rounds of the macro-batch so far, and the learner's speed."""
        tokens, seconds = self._learning
        speed = {"train_learned_tokens_per_second": tokens / seconds} if seconds else {}
        return {"train_prompts": float(self.prompts), **means_of_rounds(self.rounds), **speed}

    # State ------------------------------------------------------------------------------------------------------------
    def skip(self, start: int, end: int) -> None:
        """Leaves out the prompts of the samples between two positions from now on."""
        self.skipped_ranges.append([start, end])

    def state_dict(self) -> dict[str, Any]:
        """The positions, what controllers remember, and within a round its columns."""
        within = self.samples % self.config.samples != 0
        return {
            "samples": self.samples,
            "prompts": self.prompts,
            "kl_coef": self.kl_coef,
            "skipped_ranges": [list(pair) for pair in self.skipped_ranges],
            "rounds": self.rounds,
            "rows": self.rows if within else {},
            "reference": self.reference.state_dict() if self.reference is not None else {},
            "reward_model": self.collector.scorer.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; ranges skipped already stay skipped.

        Raises:
            ValueError: a number in it is not a position.
            UserError: the reward model is another one.
        """
        if state["reward_model"] != self.collector.scorer.digest:
            raise UserError(
                f"rollouts.reward_model is {self.config.reward_model!r}, which has other weights than when this run "
                "began; name the run or checkpoint that it was"
            )
        self.samples, self.prompts = read_position(state, "samples"), read_position(state, "prompts")
        self.kl_coef, self.rounds = float(state["kl_coef"]), list(state["rounds"])
        known = {tuple(pair) for pair in self.skipped_ranges}
        self.skipped_ranges += [list(pair) for pair in state["skipped_ranges"] if tuple(pair) not in known]
        self.rows, self._left = dict(state["rows"]), None
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def close(self) -> None:
        """Nothing to stop."""
