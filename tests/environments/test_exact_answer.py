"""A row of a dataset is a question with one right answer, as its loss mask says."""

import re
from pathlib import Path

import numpy as np
import pytest

from cleangpt.config import Source
from cleangpt.corpora import prepare
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.corpora.arithmetic import Problems
from cleangpt.corpora.mixture import Mixture, environments
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.data.chat_template import encode_chat, encode_prompt, special_tokens
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import CharTokenizer
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.environments.exact_answer import ExactAnswer

CORPORA = [Adder(digits=1), Multiplier(digits=1), AdderChat(digits=1)]


def opened(corpus: Problems) -> tuple[TokenDataset, Environment]:
    (source,) = prepare(corpus, Path("data")).sources
    dataset = source.dataset
    environment = corpus.environment(dataset)
    assert environment is not None
    return dataset, environment


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: type(corpus).__name__)
def test_question_and_answer_are_the_two_sides_of_the_loss_mask(corpus: Problems, workplace: Path) -> None:
    dataset, environment = opened(corpus)
    split, length = dataset.splits["val"], corpus.row_length
    assert environment.tasks("val") == split.documents == corpus.sizes()["val"]
    for task in range(split.documents):
        prompt = environment.reset("val", task)
        answer = prompt.extras["answer"]
        read, mask = split.read(task * length, length), split.read_mask(task * length, length)
        assert [*prompt.tokens, *answer] == read[: len(prompt.tokens) + len(answer)].tolist()
        assert answer == read[mask.astype(bool)].tolist()  # one run of tokens in these corpora
        assert prompt.max_new_tokens == len(answer) == np.count_nonzero(mask)


def test_the_reward_is_1_for_the_whole_answer_alone(workplace: Path) -> None:
    dataset, environment = opened(Adder(digits=1))
    episode = Episode("test", 3, environment.reset("test", 3))
    answer = episode.prompt.extras["answer"]
    left, right = dataset.tokenizer.decode(episode.prompt.tokens).removesuffix("=").split("+")
    assert dataset.tokenizer.decode(answer)[::-1].strip() == f"{int(left) + int(right):02d}"
    assert environment.step(episode, answer) == Feedback(reward=1.0, done=True)
    for wrong in (answer[:-1], [*answer, 0], [(answer[0] + 1) % 10, *answer[1:]], []):
        assert environment.step(episode, wrong).reward == 0.0


def test_only_the_run_of_tokens_after_the_question_is_the_answer() -> None:
    """A conversation may go on after the first answer; what follows is not asked for."""

    class Conversation:
        row_length = 6

        class Rows:
            documents, records = 1, {}

            def read_row(self, number: int) -> tuple[list[int], list[int]]:
                return [7, 8, 1, 2, 9, 3], [0, 0, 1, 1, 0, 1]

        splits = {"val": Rows()}  # noqa: RUF012
        tokenizer = CharTokenizer("0123456789")

    environment = ExactAnswer(Conversation())  # type: ignore[arg-type]
    right = {"answer": [1, 2], "text": "12"}
    assert environment.reset("val", 0) == Prompt([7, 8], max_new_tokens=2, extras=right)


@pytest.mark.parametrize("number", range(6))
def test_prompt_and_answer_are_the_tokens_of_the_whole_conversation(number: int, workplace: Path) -> None:
    """However they are cut: with one end token, nothing twice between them, and nothing that only encoding them
    together or apart would make."""
    corpus = AdderChat(digits=1)
    dataset = prepare(corpus, Path("data")).sources[0].dataset
    environment, tokenizer = ExactAnswer(dataset), dataset.tokenizer
    prompt = environment.reset("val", number)
    episode = Episode("val", number, prompt)
    answer = prompt.extras["answer"]
    assert environment.step(episode, answer).reward == 1
    text = tokenizer.decode(prompt.tokens)
    one, other = map(int, re.findall(r"\d+", text))
    question = text.removeprefix("user\n").partition("\n")[0]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": corpus.answer(one, other)}]
    template = corpus.chat_template()
    text, _ = template.render_answers(messages, special_tokens(tokenizer))
    ((whole, _),) = encode_chat(tokenizer, [text])
    assert [*prompt.tokens, *answer] == whole.tolist()[: len(prompt.tokens) + len(answer)]
    assert prompt.tokens == encode_prompt(template, tokenizer, messages[:1])
    assert answer.count(tokenizer.eos_id) == 1 and answer[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in prompt.tokens and not whole[len(prompt.tokens) + len(answer) :].any()


def test_each_source_of_a_mixture_has_its_own_environment(workplace: Path) -> None:
    Path("input.txt").write_text("To be, or not to be: that is the question.\n" * 200, encoding="utf-8")
    corpora = {"one": Adder(digits=1), "two": Adder(digits=1, seed=2)}
    mixture = Mixture(sources=tuple(Source(name=name, corpus=corpus) for name, corpus in corpora.items()))
    found = environments(mixture, prepare(mixture, Path("data")))
    assert list(found) == ["one", "two"]
    for name, corpus in corpora.items():
        (alone,) = environments(corpus, prepare(corpus, Path("data"))).values()
        questions = [alone.reset("val", task) for task in range(10)]
        assert [found[name].reset("val", task) for task in range(10)] == questions
    text = ShakespeareChar(file="input.txt")
    assert environments(text, prepare(text, Path("data"))) == {}


def test_an_episode_reads_what_has_been_said_so_far() -> None:
    episode = Episode("val", 0, Prompt([1, 2], max_new_tokens=3))
    assert episode.tokens == [1, 2] and episode.total_reward == 0
    episode.actions.append([3, 4])
    episode.feedback.append(Feedback(0.5, done=False, tokens=[5]))
    assert episode.tokens == [1, 2, 3, 4, 5] and episode.total_reward == 0.5
