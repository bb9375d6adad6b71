"""Rewards that are ready: what a program can tell of an answer.

Those that compare need the right answer as text: `text` or `answer` in the prompt's extras. Where a task has none, they
do not score.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from cleangpt.environments.base import Episode

NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
THOUGHT = re.compile(r"\s*<think>((?!</?think>).)*</think>((?!</?think>).)*\S((?!</?think>).)*", re.DOTALL)
BOX = "\\boxed{"
WORDS = 3
"""In a row, that `repetition` counts."""


def number(prompt: str, answer: str, episode: Episode) -> float | None:
    """1 if the last number of the answer is that of the right one: 1,250.0 is 1250."""
    right = last_number(right_answer(episode) or "")
    return None if right is None else float(last_number(answer) == right)


def boxed(prompt: str, answer: str, episode: Episode) -> float | None:
    r"""1 if the last \boxed{…} contains the right answer: the same number, or the same text but for spaces."""
    if (right := right_answer(episode)) is None:
        return None
    found = last_boxed(answer)
    return float(found is not None and _plain(found) == _plain(last_boxed(right) or right))


def contains(prompt: str, answer: str, episode: Episode) -> float | None:
    """1 if the right answer occurs in the answer, whatever the case."""
    right = right_answer(episode)
    return None if right is None else float(right.strip().casefold() in answer.casefold())


def thought(prompt: str, answer: str, episode: Episode) -> float:
    """1 if the answer has the form <think>…</think>…, with something behind it (DeepSeek-AI 2025, "DeepSeek-R1")."""
    return float(THOUGHT.fullmatch(answer) is not None)


def length(prompt: str, answer: str, episode: Episode) -> float:
    """The policy's own tokens; with a negative weight, shorter answers are better."""
    return float(sum(map(len, episode.actions)))


def repetition(prompt: str, answer: str, episode: Episode) -> float:
    """Minus the share of three words in a row that the answer has had before; 0 for fewer words."""
    words = answer.split()
    runs = [tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)]
    return len(set(runs)) / len(runs) - 1 if runs else 0.0


def matches(pattern: str) -> Callable[[str, str, Episode], float]:
    """A reward function: 1 if the whole answer matches a regular expression, whose dot also matches line ends."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda prompt, answer, episode: float(compiled.fullmatch(answer) is not None)


def right_answer(episode: Episode) -> str | None:
    """The right answer as text, if the task has one."""
    extras = episode.prompt.extras
    found = extras.get("text", extras.get("answer"))
    return found if isinstance(found, str) else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text, if there is one."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def last_boxed(text: str) -> str | None:
    r"""What is in the braces of the last \boxed{…}, which may contain others; None without one that is closed."""
    start = text.rfind(BOX) + len(BOX)
    depth = 1 if start >= len(BOX) else 0
    for end in range(start, len(text) if depth else start):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _plain(text: str) -> str | Decimal:
    text = "".join(text.split())
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else text
