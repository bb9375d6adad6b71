"""The contract of an environment: it sets tasks and rewards what a policy does with them.

The same object scores a checkpoint, by its mean reward over tasks (`evaluation/tasks.py`), and rewards a policy.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Prompt:
    """What an episode begins with."""

    tokens: list[int]
    """At least one."""
    max_new_tokens: int
    """The most tokens in an action."""
    stop_ids: Collection[int] = ()
    """Tokens that end an action; the one that does is its last token."""
    extras: dict[str, Any] = field(default_factory=dict)
    """What the environment needs to judge actions, such as the right answer; hidden from the policy."""


@dataclass(frozen=True)
class Feedback:
    """How an environment responds to an action."""

    reward: float
    done: bool = True
    """Whether the episode ends here."""
    tokens: list[int] = field(default_factory=list)
    """What the policy reads before its next action, where the episode goes on."""


@dataclass
class Episode:
    """A task, from its prompt to the last feedback so far."""

    split: str
    task: int
    prompt: Prompt
    actions: list[list[int]] = field(default_factory=list)
    """The tokens that the policy has generated, action by action."""
    feedback: list[Feedback] = field(default_factory=list)
    """One for each action."""

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
    """What the mean of the episodes' total rewards is called among the metrics."""

    def tasks(self, split: str) -> int:
        """How many tasks a split has; they are numbered from 0."""
        raise NotImplementedError

    def reset(self, split: str, task: int) -> Prompt:
        """Begins a task; the same every time."""
        raise NotImplementedError

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """Responds to an action: the tokens that the policy generated after `episode.tokens`. Changes nothing."""
        raise NotImplementedError
