"""What ready rewards tell of an answer, and where they do not score it."""

from typing import Any

import pytest

from cleangpt.environments.base import Episode, Prompt
from cleangpt.environments.rewards import REWARDS
from cleangpt.environments.verifiers import last_boxed, last_number, matches


def episode(right: Any = None, tokens: int = 0) -> Episode:
    extras = {} if right is None else {"answer": right}
    return Episode("train", 0, Prompt([1], 9, extras=extras), [list(range(tokens))])


@pytest.mark.parametrize(
    ("name", "answer", "right", "reward"),
    [
        ("number", "3 + 4 makes 7.", "7", 1.0),
        ("number", "7 + 4 makes 11", "so 7", 0.0),
        ("number", "in all 1,250.0 dollars", "#### 1250", 1.0),
        ("number", "it is -0.50", "-.5", 1.0),
        ("number", "no number here", "7", 0.0),
        ("number", "7", "a word", None),
        ("boxed", r"first \boxed{3}, then \boxed{ 42 }", "42.0", 1.0),
        ("boxed", r"\boxed{\frac{1}{2}}", r"thus \boxed{\frac{1} {2}}", 1.0),
        ("boxed", "42", "42", 0.0),
        ("boxed", r"\boxed{42", "42", 0.0),
        ("contains", "It is PARIS, of course", " Paris ", 1.0),
        ("contains", "London", "Paris", 0.0),
        ("thought", "<think>7 * 6</think>42", "", 1.0),
        ("thought", "<think>a\nb</think>\n<answer>42</answer>", "", 1.0),
        ("thought", "<think>7 * 6</think>  ", "", 0.0),
        ("thought", "<think><think>a</think></think> 42", "", 0.0),
        ("thought", "42", "", 0.0),
        ("repetition", "a b c a b c a b c", "", 3 / 7 - 1),
        ("repetition", "a b c d e", "", 0.0),
        ("repetition", "a a", "", 0.0),
    ],
)
def test_what_an_answer_is_worth(name: str, answer: str, right: str, reward: float | None) -> None:
    assert REWARDS[name]("", answer, episode(right)) == (None if reward is None else pytest.approx(reward))


@pytest.mark.parametrize("name", ["number", "boxed", "contains"])
@pytest.mark.parametrize("right", [None, [3, 4]])
def test_without_a_right_answer_as_text_nothing_is_scored(name: str, right: Any) -> None:
    assert REWARDS[name]("", "42", episode(right)) is None


def test_length_is_the_policys_own_tokens() -> None:
    assert REWARDS["length"]("some prompt", "an answer", episode(tokens=5)) == 5.0


def test_a_pattern_is_for_the_whole_answer() -> None:
    tagged = matches(r"<a>.*</a>")
    assert [tagged("", text, episode()) for text in ("<a>x\ny</a>", "<a>x</a>!", "")] == [1.0, 0.0, 0.0]


def test_nothing_is_found_where_there_is_nothing() -> None:
    assert last_number("-") is None and last_boxed("") is None and last_boxed("{}") is None
    assert last_boxed(r"\boxed{}") == ""
