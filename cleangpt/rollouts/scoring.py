"""Rewards of answers: the environment's, a reward model's and your own functions', weighted and added up."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from cleangpt.data.tokenizers import Tokenizer
from cleangpt.environments.base import Environment, Episode, Feedback
from cleangpt.environments.config import RolloutConfig
from cleangpt.environments.rewards import REWARDS, Errors, RewardFunction
from cleangpt.errors import UserError, nearest
from cleangpt.inference.rewards import RewardScorer
from cleangpt.rollouts.answers import Answer, from_episode

TASK, MODEL, OVERLONG = "task", "model", "overlong"


def check_rewards(config: RolloutConfig) -> None:
    """Checks that every reward has a function or a model.

    Raises:
        UserError: names the one that has none.
    """
    known = [TASK, MODEL, *REWARDS]
    names = [reward.name for reward in config.rewards]
    for name in names:
        if name not in known:
            raise UserError(
                f"rollouts.rewards: {name!r} is not registered in REWARDS; allowed: {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    if not names or len(set(names)) != len(names):
        raise UserError(f"rollouts.rewards are {', '.join(names) or 'none'}; allowed: one or more, each name once")
    if (MODEL in names) != (config.reward_model is not None):
        has = "None" if config.reward_model is None else repr(config.reward_model)
        raise UserError(f"rollouts.reward_model is {has}; allowed together with the reward 'model': a run")


class Scorer:
    """Scores answers."""

    def __init__(
        self, config: RolloutConfig, environment: Environment, tokenizer: Tokenizer, log: Callable[[str], None],
        reward_model: RewardScorer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.environment, self.tokenizer, self.reward_model = config, environment, tokenizer, reward_model
        self.errors = Errors(config.reward_timeout, log)
        self.digest = "" if reward_model is None else reward_model.digest
        """The reward model's checksum."""

    def respond(self, episode: Episode, action: list[int]) -> Feedback:
        """The environment's feedback; if it fails, the episode ends with the reward of an error."""
        feedback = self.errors.call(TASK, self.environment.step, episode, action)
        return Feedback(self.config.error_reward) if feedback is None else cast(Feedback, feedback)

    def score(self, episodes: Sequence[Episode], first_id: int) -> list[Answer]:
        """The answers of episodes that are over, with all their rewards; their ids are consecutive."""
        answers = [from_episode(episode, first_id + row, TASK) for row, episode in enumerate(episodes)]
        for reward in self.config.rewards:
            if reward.name == MODEL:
                assert self.reward_model is not None
                scores = self.reward_model.scores([answer.tokens for answer in answers]).tolist()
                for answer, score in zip(answers, scores, strict=True):
                    answer.rewards[MODEL] = [score]
            elif reward.name != TASK:
                for answer, episode in zip(answers, episodes, strict=True):
                    answer.rewards[reward.name] = self._call(reward.name, episode)
        for answer, episode in zip(answers, episodes, strict=True):
            self._total(answer, episode)
        return answers

    def _call(self, name: str, episode: Episode) -> list[float]:
        """The rewards by a function: of the whole answer, or of each action; none if it does not score the answer."""
        prompt = self.tokenizer.decode(episode.prompt.tokens)
        answer = self.tokenizer.decode(episode.tokens[len(episode.prompt.tokens) :])
        found = self.errors.call(name, _rewards, REWARDS[name], prompt, answer, episode)
        return [self.config.error_reward] if found is None else cast(list[float], found)

    def _total(self, answer: Answer, episode: Episode) -> None:
        """Adds up the rewards by weight; truncated and overlong answers as configured."""
        config = self.config
        answer.total = [0.0] * len(answer.actions)
        for reward in config.rewards:
            scores = answer.rewards[reward.name]
            for turn, score in enumerate(scores, start=len(answer.total) - len(scores)):
                answer.total[turn] += reward.weight * score
        if answer.total and config.overlong_tokens:
            last = len(episode.actions[-1])
            over = last - (episode.prompt.max_new_tokens - config.overlong_tokens)
            answer.rewards[OVERLONG] = [-min(max(over / config.overlong_tokens, 0.0), 1.0)]
            answer.total[-1] += answer.rewards[OVERLONG][0]
        if answer.truncated and config.truncated == "punish":
            answer.total = [0.0] * (len(answer.total) - 1) + [config.truncated_reward] * bool(answer.total)
        answer.scored = any(answer.rewards[reward.name] for reward in config.rewards if reward.weight)
        answer.masked = not answer.scored or (answer.truncated and config.truncated == "mask")


def _rewards(function: RewardFunction, prompt: str, answer: str, episode: Episode) -> list[float]:
    """The function's one number, its list of one for each action, or none.

    Raises:
        ValueError: it is none of these.
    """
    result: Any = function(prompt, answer, episode)
    if result is None:
        return []
    rewards = [float(reward) for reward in (result if isinstance(result, list | tuple) else [result])]
    if isinstance(result, list | tuple) and len(rewards) != len(episode.actions):
        raise ValueError(f"returned {len(rewards)} rewards for {len(episode.actions)} actions")
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"returned {result}, which is not a finite number")
    return rewards
