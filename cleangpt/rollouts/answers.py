"""Answers: what remains of an episode once it is over, and a round of them as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cleangpt.environments.base import Episode


@dataclass
class Answer:
    """A finished episode as a sequence of tokens, some of them the policy's own."""

    id: int
    """Prompt position x completions + place in the group, counted from the start of the run over all devices."""
    task: int
    tokens: list[int]
    """Prompt, actions, and what the environment said between them."""
    actions: list[tuple[int, int]]
    """Where each action begins and ends in `tokens`."""
    logprobs: list[float]
    """Of the actions' tokens, one after the other, under the policy that sampled them."""
    rewards: dict[str, list[float]]
    """By name: the reward after each action, before weights; empty: it does not score this answer."""
    truncated: bool
    total: list[float] = field(default_factory=list)
    """The weighted reward after each action; the last has what concerns the whole answer."""
    scored: bool = True
    """Whether a reward with a weight scores it."""
    masked: bool = False
    """Whether it is left out."""

    @property
    def length(self) -> int:
        """The policy's own tokens."""
        return len(self.logprobs)


def from_episode(episode: Episode, answer_id: int, task_rewards: str) -> Answer:
    """What remains of an episode; its rewards go by the name `task_rewards`."""
    tokens, actions = list(episode.prompt.tokens), []
    for action, feedback in zip(episode.actions, episode.feedback, strict=True):
        actions.append((len(tokens), len(tokens) + len(action)))
        tokens += [*action, *feedback.tokens]
    return Answer(
        answer_id, episode.task, tokens[: actions[-1][1]] if actions else tokens, actions,
        [logprob for part in episode.logprobs for logprob in part],
        {task_rewards: [feedback.reward for feedback in episode.feedback]}, episode.truncated,
    )  # fmt: skip


def as_columns(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """Answers as tensors, one row each, as long as the longest needs.

    Returns:
        `tokens` `(rows, seq + 1)`, int64, padded with 0; and aligned with the targets, the tokens from the second on
        `(rows, seq)`: `mask`, bool, the policy's own tokens that count; `logprobs` and `rewards`, float64.
    """
    width = max(2, *(len(answer.tokens) for answer in answers))
    tokens = np.zeros((len(answers), width), np.int64)
    mask = np.zeros((len(answers), width), bool)
    logprobs, rewards = (np.zeros((len(answers), width)) for _ in range(2))
    for row, answer in enumerate(answers):
        tokens[row, : len(answer.tokens)] = answer.tokens
        done = 0
        for (begin, end), reward in zip(answer.actions, answer.total, strict=True):
            logprobs[row, begin:end] = answer.logprobs[done : done + end - begin]
            mask[row, begin:end] = not answer.masked
            rewards[row, end - 1] += reward
            done += end - begin
    columns = {"tokens": tokens, "mask": mask[:, 1:], "logprobs": logprobs[:, 1:], "rewards": rewards[:, 1:]}
    return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
