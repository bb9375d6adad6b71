"""Collects a round of answers: which prompts, who generates what, and which groups are kept."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cleangpt.data.shuffle import Order, mix, permute
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.base import Environment, Episode, Prompt
from cleangpt.environments.config import RolloutConfig
from cleangpt.errors import UserError
from cleangpt.inference.sampling import Sampling
from cleangpt.rollouts.answers import Answer
from cleangpt.rollouts.episodes import Sampler, play
from cleangpt.rollouts.scoring import Scorer
from cleangpt.tracking.metrics import metric_key

EXAMPLES = 4
"""Answers of a round that are kept as text."""
SPLIT = "train"
CHECKED = 100
"""Tasks of a split that are checked before a run starts."""


@dataclass(frozen=True)
class Collected:
    """A round of answers; those of a prompt are neighbors."""

    answers: list[Answer]
    prompts: int
    """Prompts drawn for it."""
    without_signal: float
    """The share of groups drawn in which all answers had the same reward."""
    drawn_reward: float
    """The mean reward of all answers drawn."""
    best_reward: float
    """The mean over all prompts drawn of the highest reward of an answer: for right or wrong answers, pass@n."""
    errors: int
    """Rewards that failed, over all devices."""
    examples: list[str]
    """Some answers as text, with their rewards."""


class Collector:
    """Generates and scores answers; all processes call it together, and all get the whole round.

    Answers are generated in chunks of `micro_batch_size`, each by one process, so that what a chunk is computed with
    does not depend on how many processes there are.

    Args:
        config: of the rollouts.
        environment: sets the prompts.
        scorer: of answers.
        sampling: opens the sampler of the current weights, for the length of a context.
        tokenizer: of the text.
        limit: the most tokens that a prompt with its answer may have.
        seed: of the order of prompts and of the draws.
        ranks: the processes.
    """

    def __init__(
        self, config: RolloutConfig, environment: Environment, scorer: Scorer,
        sampling: Callable[[], AbstractContextManager[Sampler]], tokenizer: Tokenizer, *, limit: int, seed: int,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self.config, self.environment, self.scorer, self.sampling = config, environment, scorer, sampling
        self.tokenizer, self.limit, self.seed, self.ranks = tokenizer, limit, seed, ranks
        self.order = Order(environment.tasks(SPLIT), seed)

    def collect(self, first: int) -> Collected:
        """A round of answers to the prompts from position `first` on."""
        config, drawn = self.config, list[list[Answer]]()
        kept, spare = list[list[Answer]](), list[list[Answer]]()
        self.scorer.errors.count = 0
        most = config.prompts * (config.max_draws if config.dynamic_sampling else 1)
        while len(kept) < config.prompts and len(drawn) < most:
            # As many as will do at the share kept so far.
            lacking = (config.prompts - len(kept)) * len(drawn) / max(len(kept), 1) if drawn else config.prompts
            groups = self._draw(first + len(drawn), min(math.ceil(lacking), config.prompts, most - len(drawn)))
            drawn += groups
            for group in groups:
                (kept if has_signal(group) else spare).append(group)
        groups = (kept + spare)[: config.prompts] if config.dynamic_sampling else drawn
        totals = [[sum(answer.total) for answer in group if answer.scored] for group in drawn]
        totals = [scores for scores in totals if scores] or [[0.0]]
        return Collected(
            [answer for group in groups for answer in group],
            prompts=len(drawn),
            without_signal=len(spare) / len(drawn),
            drawn_reward=float(np.mean([total for scores in totals for total in scores])),
            best_reward=float(np.mean([max(scores) for scores in totals])),
            errors=int(self.ranks.sum(self.scorer.errors.count)[0]),
            examples=[self._text(group[0]) for group in groups[:EXAMPLES]],
        )

    def _draw(self, first: int, count: int) -> list[list[Answer]]:
        """The groups of answers to `count` prompts, shared among the processes by chunks."""
        config, each = self.config, self.config.completions
        tasks = self.order.at(np.arange(first, first + count))[1].repeat(each)
        rows, own = np.arange(len(tasks)), list[Answer]()
        with self.sampling() as sampler, self.scorer.errors:
            for number, start in enumerate(range(0, len(tasks), config.micro_batch_size)):
                if number % self.ranks.world_size == self.ranks.rank:
                    chunk = rows[start : start + config.micro_batch_size]
                    own += self._chunk(sampler, tasks[chunk].tolist(), first * each + start)
        answers = sorted((answer for part in self.ranks.all_gather(own) for answer in part), key=lambda one: one.id)
        return [answers[start : start + each] for start in range(0, len(answers), each)]

    def _chunk(self, sampler: Sampler, tasks: Sequence[int], first_id: int) -> list[Answer]:
        """Answers to tasks; their ids are consecutive."""
        prompts = {task: checked_prompt(self.environment, SPLIT, task, self.limit) for task in set(tasks)}
        episodes = [Episode(SPLIT, task, prompts[task]) for task in tasks]
        seeds = [mix(self.seed, first_id + row) for row in range(len(tasks))]
        play(
            sampler, self.environment, episodes, sampling=Sampling(temperature=self.config.temperature), seeds=seeds,
            limit=self.limit, respond=self.scorer.respond,
        )  # fmt: skip
        return self.scorer.score(episodes, first_id)

    def line(self, answer: Answer) -> dict[str, Any]:
        """An answer for answers.jsonl."""
        prompt, completion = self._texts(answer)
        rewards = {metric_key("reward", name): sum(scores) for name, scores in answer.rewards.items() if scores}
        return {
            "id": answer.id, "task": answer.task, "prompt": prompt, "completion": completion,
            "reward": sum(answer.total) if answer.scored else None, **rewards, "tokens": answer.length,
            "truncated": answer.truncated, "left_out": answer.masked,
        }  # fmt: skip

    def _text(self, answer: Answer) -> str:
        """An answer for a reader, after its rewards."""
        rewards = ", ".join(f"{name} {sum(scores):.3g}" for name, scores in answer.rewards.items() if scores)
        prompt, text = self._texts(answer)
        return f"[reward {sum(answer.total):.3g}: {rewards}] {prompt}│{text}"

    def _texts(self, answer: Answer) -> tuple[str, str]:
        """Prompt and what follows it."""
        begin = answer.actions[0][0] if answer.actions else len(answer.tokens)
        return self.tokenizer.decode(answer.tokens[:begin]), self.tokenizer.decode(answer.tokens[begin:])


def has_signal(group: Sequence[Answer]) -> bool:
    """Whether the answers to a prompt that count differ in reward, by outcome: a standard deviation may round to 0."""
    totals = {sum(answer.total) for answer in group if not answer.masked}
    return len(totals) > 1


def check_prompts(environment: Environment, limit: int) -> None:
    """Checks some tasks of every split that is used, before anything starts; all others as they are drawn.

    Raises:
        UserError: `checked_prompt` refuses a prompt, or there are no tasks.
    """
    for split in (SPLIT, "val"):
        count = environment.tasks(split)
        if not count:
            raise UserError(f"the environment has no tasks in the {split} split; allowed: one or more")
        for task in permute(np.arange(min(count, CHECKED)), count, 1).tolist():
            checked_prompt(environment, split, task, limit)


def checked_prompt(environment: Environment, split: str, task: int, limit: int) -> Prompt:
    """The prompt of a task.

    Raises:
        UserError: it leaves too little room for its answer; or it has more than tokens, and is of no simulation.
    """
    prompt, what = environment.reset(split, task), f"task {task} of the {split} split"
    if prompt.inputs and not environment.simulated:
        raise UserError(f"{what} has {', '.join(prompt.inputs)}; allowed for a policy that learns: tokens alone")
    longest = len(prompt.tokens) + prompt.max_new_tokens
    if longest > limit:
        raise UserError(
            f"data.seq_len is {limit - 1}; {what} has a prompt of {len(prompt.tokens)} tokens and an answer of up to "
            f"{prompt.max_new_tokens}; allowed: {longest - 1} or more"
        )
    return prompt
