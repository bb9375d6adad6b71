"""The loss is that of the whole split; exact match asks a model to generate, and believes nothing else."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from cleangpt.corpora import prepare
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.data.batch import Batch
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.loader import Samples, validation_batches
from cleangpt.evaluation.exact_match import exact_match
from cleangpt.evaluation.validate import loss_figures, mean_loss
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.objectives import NextToken
from tests.scripted import Scripted

CPU = torch.device("cpu")


class Calculator(Scripted):
    """Answers as a pocket calculator would, wrong for the problems it is told to; logits are one-hot."""

    def __init__(self, store: TokenDataset, wrong: float = 0.0) -> None:
        super().__init__(vocab_size=13)
        self.tokenizer, self.wrong, self.asked = store.tokenizer, wrong, set()

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


@pytest.fixture
def store(tiny: Callable[..., Experiment]) -> TokenDataset:
    return prepare(tiny().corpus, Path("data"))


def test_right_answers_score_one_and_wrong_ones_zero(store: TokenDataset) -> None:
    assert exact_match(Calculator(store), store.splits["test"], None, CPU) == 1.0
    assert exact_match(Calculator(store, wrong=1.0), store.splits["test"], None, CPU) == 0.0


class Reciter(Scripted):
    """Goes on from every beginning of a text that it knows by heart."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__(vocab_size=257, max_seq_len=200)
        self.known = {tuple(text[:length]): text[length] for text in texts for length in range(1, len(text))}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(tokens.tolist()):
            logits[row, -1, self.known.get(tuple(ids), 0)] = 1
        return logits


@pytest.mark.parametrize("wrong", ["nothing", "the first token", "the last token", "what stands before"])
def test_answers_and_questions_of_any_length_are_scored(wrong: str, workplace: Path) -> None:
    store = prepare(AdderChat(digits=1), Path("data"))
    split, length = store.splits["val"], store.row_length
    assert length is not None
    texts = []
    for row in range(split.documents):
        ids, mask = split.read(row * length, length).tolist(), split.read_mask(row * length, length)
        first, last = int(mask.argmax()), int(np.flatnonzero(mask)[-1])
        if row % 5 == 0:
            place = {"nothing": None, "the first token": first, "the last token": last, "what stands before": 0}[wrong]
            if place is not None:
                ids[place] = 255
        texts.append(ids[: last + 1])
    expected = 1.0 if wrong == "nothing" else 0.8
    assert len({len(text) for text in texts}) > 1
    assert exact_match(Reciter(texts), split, None, CPU) == expected


def test_the_score_is_the_share_of_right_answers(store: TokenDataset) -> None:
    model = Calculator(store, wrong=0.4)
    score = exact_match(model, store.splits["val"], None, CPU)
    expected = np.mean([hash(question) % 1000 >= 400 for question in model.asked])
    assert len(model.asked) == 40 and score == pytest.approx(expected)


def test_a_limit_asks_the_same_problems_every_time(store: TokenDataset) -> None:
    one, two = Calculator(store), Calculator(store)
    for model in (one, two):
        exact_match(model, store.splits["val"], 7, CPU)
    assert len(one.asked) == 7 and one.asked == two.asked


def test_no_answer_is_given_away(store: TokenDataset) -> None:
    """A model that copies the answer out of its input would see it only if it stood there."""

    class Peeking(Calculator):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape[1] < store.row_length
            assert all(len(self.tokenizer.decode(ids).split("=")[1]) <= 3 for ids in tokens.tolist())
            return super().logits(tokens)

    assert exact_match(Peeking(store), store.splits["test"], None, CPU) == 1.0


def test_the_mean_loss_weighs_every_target_the_same_whatever_the_batch_size(store: TokenDataset) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, max_seq_len=9, n_layers=1, n_heads=1, dim=8, dropout=0.5)).train()
    samples = Samples(store.splits["val"], 9)
    losses = [
        mean_loss(model, NextToken(), validation_batches(samples, size), CPU, nullcontext()) for size in (1, 7, 40, 64)
    ]
    assert losses == pytest.approx([losses[0]] * 4)
    assert model.training


def test_giving_up_is_told_by_a_nan(store: TokenDataset) -> None:
    def endless() -> Iterator[Batch]:
        yield from validation_batches(Samples(store.splits["val"], 9), 4)
        raise AssertionError("went on")

    model = GPT(GPTConfig(vocab_size=13, max_seq_len=9, n_layers=1, n_heads=1, dim=8))
    asked = iter([False, False, True])
    assert math.isnan(mean_loss(model, NextToken(), endless(), CPU, nullcontext(), lambda: next(asked)))


def test_bits_per_byte_follow_from_the_bytes_of_text() -> None:
    class Facts:
        tokens, text_bytes, masked = 250, 1000, False

    figures = loss_figures(2.0, Facts())  # type: ignore[arg-type]
    assert figures["perplexity"] == pytest.approx(math.e**2)
    assert figures["bits_per_byte"] == pytest.approx(2.0 * 250 / 1000 / math.log(2))
    Facts.masked = True
    assert loss_figures(2.0, Facts())["bits_per_byte"] is None  # type: ignore[arg-type]
    Facts.text_bytes, Facts.masked = 0, False
    assert loss_figures(2.0, Facts())["bits_per_byte"] is None  # type: ignore[arg-type]
    assert loss_figures(1e6, Facts())["perplexity"] == math.inf  # type: ignore[arg-type]
