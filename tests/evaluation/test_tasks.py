"""A score asks a model to generate, and believes nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cleangpt.corpora import prepare
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.shuffle import mix, permute
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.environments.exact_answer import ExactAnswer
from cleangpt.evaluation.tasks import choose_tasks, mean_reward, task_metrics
from cleangpt.experiment import Experiment
from tests.scripted import Bigrams, Scripted

CPU = torch.device("cpu")


class Calculator(Scripted):
    """Answers as a pocket calculator would, with a wrong sum for a share of the questions; logits are one-hot."""

    def __init__(self, dataset: TokenDataset, wrong: float = 0.0) -> None:
        super().__init__(vocab_size=13)
        self.tokenizer, self.wrong, self.asked = dataset.tokenizer, wrong, set[str]()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 13)
        for row, ids in enumerate(tokens.tolist()):
            text = self.tokenizer.decode(ids)
            question, answer = text.split("=")
            self.asked.add(question)
            left, right = question.split("+")
            total = int(left) + int(right) + (hash(question) % 1000 < 1000 * self.wrong)
            solution = f"{total:03d}"[::-1] + "\n"
            logits[row, -1, int(self.tokenizer.encode(solution[len(answer)])[0])] = 1
        return logits


def score(model: Scripted, dataset: TokenDataset, split: str, limit: int | None = None) -> float:
    return mean_reward(model, ExactAnswer(dataset), split, limit, CPU)


@pytest.fixture
def dataset(tiny: Callable[..., Experiment]) -> TokenDataset:
    (source,) = prepare(tiny().corpus, Path("data")).sources
    return source.dataset


def test_right_answers_score_one_and_wrong_ones_zero(dataset: TokenDataset) -> None:
    assert score(Calculator(dataset), dataset, "test") == 1.0
    assert score(Calculator(dataset, wrong=1.0), dataset, "test") == 0.0


class Reciter(Scripted):
    """Continues every beginning of a text that it knows by heart."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__(vocab_size=257, max_seq_len=200)
        self.known = {tuple(text[:length]): text[length] for text in texts for length in range(1, len(text))}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(tokens.tolist()):
            for length in range(1, len(ids) + 1):
                logits[row, length - 1, self.known.get(tuple(ids[:length]), 0)] = 1
        return logits


@pytest.mark.parametrize("wrong", ["nothing", "the first token", "the last token", "the question"])
def test_answers_and_questions_of_any_length_are_scored(wrong: str, workplace: Path) -> None:
    (source,) = prepare(AdderChat(digits=1), Path("data")).sources
    dataset = source.dataset
    split, length = dataset.splits["val"], dataset.row_length
    assert length is not None
    texts = []
    for row in range(split.documents):
        ids, mask = split.read(row * length, length).tolist(), split.read_mask(row * length, length)
        first, last = int(mask.argmax()), int(np.flatnonzero(mask)[-1])
        if row % 5 == 0:
            place = {"nothing": None, "the first token": first, "the last token": last, "the question": 0}[wrong]
            if place is not None:
                ids[place] = 255
        texts.append(ids[: last + 1])
    assert len({len(text) for text in texts}) > 1
    assert score(Reciter(texts), dataset, "val") == (1.0 if wrong == "nothing" else 0.8)


def test_the_score_is_the_share_of_right_answers(dataset: TokenDataset) -> None:
    model = Calculator(dataset, wrong=0.4)
    expected = score(model, dataset, "val")
    assert len(model.asked) == 40
    assert expected == pytest.approx(np.mean([hash(question) % 1000 >= 400 for question in model.asked]))


def test_a_limit_tries_the_same_tasks_every_time_spread_over_the_split(dataset: TokenDataset) -> None:
    one, two = Calculator(dataset), Calculator(dataset)
    for model in (one, two):
        score(model, dataset, "val", limit=7)
    assert len(one.asked) == 7 and one.asked == two.asked
    tasks = choose_tasks(10_000, 500)
    assert tasks == sorted(permute(np.arange(500), 10_000, mix(1)).tolist()) and len(set(tasks)) == 500
    assert all(any(start <= task < start + 1000 for task in tasks) for start in range(0, 10_000, 1000))
    assert choose_tasks(5, 5) == choose_tasks(5, None) == [0, 1, 2, 3, 4]


def test_no_answer_is_given_away(dataset: TokenDataset) -> None:
    """A model that copies the answer out of its input would see it only if it stood there."""
    assert dataset.row_length is not None

    class Peeking(Calculator):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape[1] < (dataset.row_length or 0)
            assert all(len(self.tokenizer.decode(ids).split("=")[1]) <= 3 for ids in tokens.tolist())
            return super().logits(tokens)

    assert score(Peeking(dataset), dataset, "test") == 1.0


class Walk(Environment):
    """Two turns: each rewards the token 1 at its end by the task's number; a turn ends at the token 0 or 1."""

    def tasks(self, split: str) -> int:
        return 3

    def reset(self, split: str, task: int) -> Prompt:
        return Prompt([task], max_new_tokens=10, stop_ids={0, 1})

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        return Feedback(float(episode.task * (action[-1] == 1)), done=len(episode.actions) == 1, tokens=[3])


def test_an_episode_may_have_several_turns() -> None:
    """The reward is what a loop over single tokens gives."""
    for seed in range(5):
        model, total = Bigrams(seed), 0
        for task in range(3):
            token = task
            for _ in range(2):
                for _ in range(10):
                    token = int(model.table[token].argmax())
                    if token in (0, 1):
                        break
                total += task * (token == 1)
                token = 3
        assert mean_reward(model, Walk(), "val", None, CPU) == pytest.approx(total / 3)


def test_measures_are_means_over_the_episodes_that_have_them(dataset: TokenDataset) -> None:
    class Measured(ExactAnswer):
        def measures(self, episode: Episode) -> dict[str, float]:
            return {"even" if episode.task % 2 == 0 else "odd": float(episode.task)}

    environment = Measured(dataset)
    count = environment.tasks("val")
    found = task_metrics(Calculator(dataset), environment, "val", CPU)
    assert found == {"exact_match": 1.0, "even": np.mean(range(0, count, 2)), "odd": np.mean(range(1, count, 2))}
