"""Plays episodes: what scores a checkpoint and what trains a policy."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from cleangpt.data.shuffle import mix
from cleangpt.environments.base import Environment, Episode, Feedback
from cleangpt.inference.engine import Completion
from cleangpt.inference.sampling import GREEDY, Sampling

Respond = Callable[[Episode, list[int]], Feedback]
"""From an episode and an action to feedback."""


class Sampler(Protocol):
    """What generates answers: `Engine`, or another program."""

    def submit(
        self, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling, seed: int | None,
        stop_ids: Collection[int], inputs: Mapping[str, Tensor] | None = None,
    ) -> int:  # fmt: skip
        """Adds a request and returns its id."""

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """The id and the tokens of each request as it ends, until all have; more may be submitted meanwhile."""


def play(
    sampler: Sampler,
    environment: Environment,
    episodes: Sequence[Episode],
    *,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
    respond: Respond | None = None,
) -> None:
    """Plays all episodes to their ends, in place.

    Args:
        sampler: of the policy's actions.
        environment: of the episodes.
        episodes: just begun.
        sampling: how actions are sampled.
        seeds: of the episodes; each of their actions has a seed that follows from it. None: the seed of `sampling`.
        limit: the most tokens that the policy reads and writes; an episode that grows longer ends as truncated. None:
            any number.
        respond: used instead of the environment's `step`; None: that.
    """
    respond, acting = respond or environment.step, dict[int, int]()

    def act(number: int) -> None:
        episode = episodes[number]
        tokens, prompt = episode.tokens, episode.prompt
        if limit is not None and len(tokens) + prompt.max_new_tokens > limit:
            episode.truncated = True
            return
        seed = None if seeds is None else mix(seeds[number], len(episode.actions))
        request_id = sampler.submit(
            tokens, max_new_tokens=prompt.max_new_tokens, sampling=sampling, seed=seed, stop_ids=prompt.stop_ids,
            inputs=prompt.inputs,
        )  # fmt: skip
        acting[request_id] = number

    for number in range(len(episodes)):
        act(number)
    for request_id, completion in sampler.completions():
        number = acting.pop(request_id)
        episode = episodes[number]
        episode.truncated = completion.finish_reason == "length" and bool(episode.prompt.stop_ids)
        feedback = respond(episode, completion.ids)
        episode.actions.append(completion.ids)
        episode.logprobs.append(completion.logprobs)
        episode.feedback.append(feedback)
        if not feedback.done:
            act(number)
