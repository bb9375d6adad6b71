"""Rewards are weighted and added up; a reward that fails is counted and named, and does not end the run."""

import time
from typing import Any

import pytest

from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.environments.config import Reward, RolloutConfig
from cleangpt.environments.rewards import REWARDS
from cleangpt.errors import UserError
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.policy import Round
from cleangpt.objectives.ppo import PPO
from cleangpt.rollouts.answers import as_columns
from cleangpt.rollouts.scoring import Scorer, check_rewards

TOKENIZER = ByteTokenizer()


def code(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER.encode(text)]


class Constant(Environment):
    """Every answer is worth 2."""

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        return Feedback(2.0)


def length(prompt: str, answer: str, episode: Episode) -> float:
    return len(answer)


def broken(prompt: str, answer: str, episode: Episode) -> float:
    raise KeyError("no such answer")


def slow(prompt: str, answer: str, episode: Episode) -> float:
    while True:
        pass


def infinite(prompt: str, answer: str, episode: Episode) -> float:
    return float("inf")


def text(prompt: str, answer: str, episode: Episode) -> Any:
    return "good"


def even(prompt: str, answer: str, episode: Episode) -> float | None:
    """Scores answers of an even length alone."""
    return None if len(answer) % 2 else -1.0


def each_action(prompt: str, answer: str, episode: Episode) -> list[float]:
    return [len(action) for action in episode.actions]


def one_too_many(prompt: str, answer: str, episode: Episode) -> list[float]:
    return [0.0] * (len(episode.actions) + 1)


def infinite_once(prompt: str, answer: str, episode: Episode) -> list[float]:
    return [float("nan")] * len(episode.actions)


OWN = (length, broken, slow, infinite, text, even, each_action, one_too_many, infinite_once)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in OWN:
        monkeypatch.setitem(REWARDS, function.__name__, function)


def episode(answer: str, limit: int = 10, truncated: bool = False, reward: float = 2.0) -> Episode:
    prompt = Prompt(code("ab"), limit, stop_ids={10})
    tokens = code(answer)
    return Episode("train", 0, prompt, [tokens], [Feedback(reward)], [[-0.5] * len(tokens)], truncated)


def scorer(log: list[str] | None = None, **fields: Any) -> Scorer:
    return Scorer(RolloutConfig(**fields), Constant(), TOKENIZER, (log if log is not None else []).append)


def rewards(*named: tuple[str, float]) -> tuple[Reward, ...]:
    return tuple(Reward(name=name, weight=weight) for name, weight in named)


def test_rewards_are_added_up_by_weight() -> None:
    (answer,) = scorer(rewards=rewards(("task", 1.0), ("length", -0.1))).score([episode("xyz")], 7)
    assert answer.id == 7
    assert answer.rewards == {"task": [2.0], "length": [3.0]}
    assert answer.total == [pytest.approx(2.0 - 0.3)]


def test_an_answer_that_a_reward_does_not_score_has_the_others_or_is_left_out() -> None:
    """Of its group's mean and of the loss, as if it had never been sampled."""
    answers = scorer(rewards=rewards(("even", 2.0))).score([episode(text) for text in ("ab", "abc", "a", "abcd")], 0)
    assert [answer.rewards["even"] for answer in answers] == [[-1.0], [], [], [-1.0]]
    assert (
        [answer.scored for answer in answers] == [not answer.masked for answer in answers] == [True, False, False, True]
    )
    answers[0].total = [1.0]
    columns = as_columns(answers)
    rollouts = Round(columns["mask"], columns["rewards"], columns["logprobs"], 4)
    advantages = GRPO(standardise=False).estimate(rollouts)["advantages"]
    assert advantages.sum(dim=1).tolist() == [2 * 1.5, 0.0, 0.0, 4 * -1.5]
    both = scorer(rewards=rewards(("even", 1.0), ("length", 1.0))).score([episode("abc"), episode("ab")], 0)
    assert [(answer.scored, answer.total) for answer in both] == [(True, [3.0]), (True, [1.0])]
    logged = scorer(rewards=rewards(("even", 1.0), ("length", 0.0))).score([episode("abc")], 0)
    assert not logged[0].scored, "a reward that is only logged does not score"


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("broken", "broken: KeyError: 'no such answer'"),
        ("slow", "slow: TimeoutError: took longer than 0.05 s"),
        ("infinite", "infinite: ValueError: returned inf, which is not a finite number"),
        ("text", "text: ValueError: could not convert string to float: 'good'"),
        ("one_too_many", "one_too_many: ValueError: returned 2 rewards for 1 actions"),
        ("infinite_once", "infinite_once: ValueError: returned [nan], which is not a finite number"),
    ],
)
def test_a_reward_that_fails_scores_as_an_error_and_is_counted_and_named_once(name: str, named: str) -> None:
    log: list[str] = []
    failing = scorer(log, rewards=rewards((name, 2.0)), reward_timeout=0.05, error_reward=-1.0)
    began = time.perf_counter()
    with failing.errors:
        answers = failing.score([episode("a"), episode("b")], 0)
    assert time.perf_counter() - began < 2
    assert [answer.total for answer in answers] == [[-2.0], [-2.0]]
    assert failing.errors.count == 2
    assert len(log) == 1 and named in log[0]


def test_an_environment_that_fails_ends_the_episode_with_the_reward_of_an_error() -> None:
    class Broken(Environment):
        def step(self, episode: Episode, action: list[int]) -> Feedback:
            raise ZeroDivisionError

    log: list[str] = []
    failing = Scorer(RolloutConfig(error_reward=-3.0), Broken(), TOKENIZER, log.append)
    assert failing.respond(episode("a"), [1]) == Feedback(-3.0)
    assert failing.errors.count == 1 and "task: ZeroDivisionError" in log[0]


def test_truncated_answers_are_kept_masked_or_punished_and_keep_their_own_tokens() -> None:
    cut = episode("xyz", truncated=True)
    for mode, total, counted in (("keep", 2.0, 3), ("mask", 2.0, 0), ("punish", -1.0, 3)):
        (answer,) = scorer(truncated=mode).score([cut], 0)
        columns = as_columns([answer])
        assert answer.truncated and answer.total == [total]
        assert columns["tokens"].tolist() == [code("abxyz")], "no end is patched in"
        assert int(columns["mask"].sum()) == counted


@pytest.mark.parametrize(("length", "expected"), [(5, 0.0), (6, 0.0), (8, -0.5), (10, -1.0)])
def test_overlong_answers_lose_reward_linearly(length: int, expected: float) -> None:
    """Yu et al. 2025, equation 13, with a limit of 10 and 4 tokens before it."""
    (answer,) = scorer(overlong_tokens=4).score([episode("x" * length)], 0)
    assert answer.total == [pytest.approx(2.0 + expected)]


def test_the_end_of_an_answer_is_learned_exactly_once_even_if_padding_looks_like_it() -> None:
    """With a tokenizer whose end of text is token 0, as padding is."""
    prompt = Prompt([5, 6], 4, stop_ids={0})
    answers = []
    for tokens in ([7, 0], [7, 8, 9, 9]):
        done = Episode("train", 0, prompt, [tokens], [Feedback(1.0)], [[-0.5] * len(tokens)], truncated=tokens[-1] != 0)
        answers += scorer().score([done], 0)
    columns = as_columns(answers)
    targets = columns["tokens"][:, 1:][0].tolist()
    assert targets == [6, 7, 0, 0, 0]
    assert columns["mask"].tolist() == [[False, True, True, False, False], [False, True, True, True, True]]
    assert columns["rewards"].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]


def test_what_the_environment_says_between_turns_is_read_but_not_learned() -> None:
    turns = Episode(
        "train", 0, Prompt([1, 2], 3), [[3], [4, 5]], [Feedback(0.25, done=False, tokens=[8, 9]), Feedback(1.0)],
        [[-0.1], [-0.2, -0.3]],
    )  # fmt: skip
    (answer,) = scorer().score([turns], 0)
    columns = as_columns([answer])
    assert columns["tokens"].tolist() == [[1, 2, 3, 8, 9, 4, 5]] == [turns.tokens]
    assert columns["mask"].tolist() == [[False, True, False, False, True, True]]
    assert columns["logprobs"][0].tolist() == [0, -0.1, 0, 0, -0.2, -0.3]
    assert columns["rewards"][0].tolist() == [0, 0.25, 0, 0, 0, 1.0]


def test_a_reward_of_each_action_is_credited_to_it_and_one_of_the_answer_to_the_last() -> None:
    """Two actions, of 1 and 2 tokens; PPO's advantages see when each reward came."""
    turns = Episode(
        "train", 0, Prompt([1, 2], 3), [[3], [4, 5]], [Feedback(0.0, done=False, tokens=[8, 9]), Feedback(0.0)],
        [[-0.1], [-0.2, -0.3]],
    )  # fmt: skip
    (answer,) = scorer(rewards=rewards(("each_action", 10.0), ("length", 1.0))).score([turns], 0)
    assert answer.rewards["each_action"] == [1.0, 2.0]
    assert answer.total == [10.0, 20.0 + answer.rewards["length"][0]]
    (answer,) = scorer(rewards=rewards(("each_action", 1.0))).score([turns], 0)
    columns = as_columns([answer])
    assert columns["rewards"][0].tolist() == [0, 1, 0, 0, 0, 2]
    rollouts = Round(columns["mask"], columns["rewards"], columns["logprobs"], 1, values=0 * columns["logprobs"])
    assert PPO(lam=1.0, whiten=False).estimate(rollouts)["advantages"].tolist() == [[0, 3, 0, 0, 2, 2]]
    assert rollouts.returns.tolist() == [3.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": rewards(("lenght", 1.0))}, "'lenght' is not registered in REWARDS; .*did you mean 'length'"),
        ({"rewards": ()}, "rollouts.rewards are none; allowed: one or more"),
        ({"rewards": rewards(("task", 1.0), ("task", 2.0))}, "are task, task; allowed: .* each name once"),
        ({"rewards": rewards(("model", 1.0))}, "rollouts.reward_model is None; allowed together with"),
        ({"reward_model": "x"}, "rollouts.reward_model is 'x'; allowed together with"),
    ],
)
def test_rewards_that_are_nothing_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rewards(RolloutConfig(**fields))
