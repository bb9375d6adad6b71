"""The contract of an environment: it sets tasks and rewards a policy's actions.

The same object scores a checkpoint, by its mean reward over tasks (`evaluation/tasks.py`), and rewards a policy.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """The start of an episode."""

    tokens: list[int]
    """Token ids, at least one."""
    max_new_tokens: int
    """Maximum number of tokens in an action."""
    stop_ids: Collection[int] = ()
    """Tokens that end an action and are included in it."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What the policy reads besides tokens, such as images and where they end; see `data/records.py`."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Data that the environment needs to judge actions, such as the right answer; hidden from the policy."""


@dataclass(frozen=True)
class Feedback:
    """How an environment responds to an action."""

    reward: float
    done: bool = True
    """Whether the episode has ended."""
    tokens: list[int] = field(default_factory=list)
    """Tokens that the policy reads before its next action, unless the episode has ended."""


@dataclass
class Episode:
    """An attempt at a task, from its prompt to the latest feedback."""

    split: str
    task: int
    prompt: Prompt
    actions: list[list[int]] = field(default_factory=list)
    """The tokens that the policy has generated, action by action."""
    feedback: list[Feedback] = field(default_factory=list)
    """One per action."""
    logprobs: list[list[float]] = field(default_factory=list)
    """The log-probability of each token of each action, under the policy that sampled it."""
    truncated: bool = False
    """Whether the last action ran into a limit before its stop token."""

    @property
    def tokens(self) -> list[int]:
        """Everything that the policy reads before its next action: prompt, actions, feedback."""
        tokens = list(self.prompt.tokens)
        for action, feedback in zip(self.actions, self.feedback, strict=True):
            tokens += [*action, *feedback.tokens]
        return tokens

    @property
    def total_reward(self) -> float:
        """The sum of all rewards so far: the undiscounted return."""
        return sum(feedback.reward for feedback in self.feedback)


class Environment:
    """Tasks and their rewards. A task is an integer, so an episode depends on nothing but it and the policy."""

    metric: ClassVar[str] = "reward"
    """Name of the metric that is the mean total reward of episodes."""
    simulated: ClassVar[bool] = False
    """Whether a policy acts in a simulation step by step, as `rollouts/agent.py` does."""

    def tasks(self, split: str) -> int:
        """Number of tasks in a split; they are numbered from 0."""
        raise NotImplementedError

    def reset(self, split: str, task: int) -> Prompt:
        """Starts a task; deterministic."""
        raise NotImplementedError

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """Responds to an action: the tokens that the policy generated after `episode.tokens`. Has no side effects."""
        raise NotImplementedError

    def measures(self, episode: Episode) -> dict[str, float]:
        """Other numbers of an episode that has ended, to report beside its reward; by default none."""
        return {}
