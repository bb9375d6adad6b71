"""Questions with one right answer: the reward is 1 if the policy generates exactly that answer, else 0."""

from dataclasses import dataclass
from typing import ClassVar

from cleangpt.data.dataset import TokenDataset
from cleangpt.data.records import records_of_row
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt


@dataclass(frozen=True)
class ExactAnswer(Environment):
    """Each row of a dataset is a task, and its loss mask separates question from answer.

    The question is every token before the first that counts in the loss; the answer is the run of counted tokens that
    starts there. The policy generates as many tokens as the answer has.
    """

    metric: ClassVar[str] = "exact_match"

    dataset: TokenDataset
    """With a row length and a loss mask."""

    def tasks(self, split: str) -> int:
        """The number of rows in the split."""
        return self.dataset.splits[split].documents

    def reset(self, split: str, task: int) -> Prompt:
        """The question of a row."""
        rows = self.dataset.splits[split]
        tokens, counted = rows.read_row(task)
        start = counted.index(1)
        answer = tokens[start : [*counted, 0].index(0, start)]
        inputs = records_of_row(rows.records, task * len(tokens), start)
        extras = {"answer": answer, "text": self.dataset.tokenizer.decode(answer)}
        return Prompt(tokens[:start], max_new_tokens=len(answer), inputs=inputs, extras=extras)

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """Compares the action with the answer."""
        return Feedback(reward=float(action == episode.prompt.extras["answer"]))


@dataclass(frozen=True)
class Word(ExactAnswer):
    """Words whose letters are tokens, with an end; measured by the share of letters that are right as well."""

    def measures(self, episode: Episode) -> dict[str, float]:
        """The share of the word's letters that the policy has generated in their places."""
        word, action = episode.prompt.extras["answer"][:-1], episode.actions[-1]
        right = sum(letter == said for letter, said in zip(word, action, strict=False))
        return {"letters": right / len(word)}
