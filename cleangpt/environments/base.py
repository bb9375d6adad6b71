"""What a policy acts in, and what a checkpoint is scored by: the same object gives tasks and judges answers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """What an episode begins with."""

    tokens: list[int]
    """At least one."""
    max_new_tokens: int
    """The longest action, in tokens."""
    extras: dict[str, Any] = field(default_factory=dict)
    """What the environment needs to judge the action, such as the right answer."""


@dataclass(frozen=True)
class Feedback:
    """What an environment answers to an action."""

    reward: float
    done: bool = True
    tokens: list[int] = field(default_factory=list)
    """What the policy reads next, where the episode goes on."""


@dataclass
class Episode:
    """A prompt and what has happened since."""

    split: str
    task: int
    prompt: Prompt
    actions: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class Environment:
    """Tasks and their rewards; a task is an integer, so that runs are deterministic and can be resumed."""

    metric = "reward"
    """What the mean reward over tasks is called among the metrics."""

    def tasks(self, split: str) -> int:
        """How many tasks a split has."""
        raise NotImplementedError

    def reset(self, split: str, task: int) -> Prompt:
        """The beginning of a task."""
        raise NotImplementedError

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """What becomes of an action: tokens that the policy has generated after all that the episode has so far."""
        raise NotImplementedError
