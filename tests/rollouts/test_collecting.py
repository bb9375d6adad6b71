"""Which prompts a round has, which groups dynamic sampling keeps, and what is refused."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cleangpt.config import LoRAConfig
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.data.shuffle import Order, mix
from cleangpt.data.tokenizers import CharTokenizer
from cleangpt.distributed.layout import Layout
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.environments.config import RolloutConfig
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import Sampling
from cleangpt.rollouts.collecting import Collector, check_prompts
from cleangpt.rollouts.episodes import play
from cleangpt.rollouts.scoring import Scorer
from cleangpt.training.launch import check
from cleangpt.training.trainer import Trainer
from tests.scripted import Bigrams

TOKENIZER = CharTokenizer("abc\n", "\n")
CPU = torch.device("cpu")


class Letters(Environment):
    """The prompt is a letter, and the reward how often the answer repeats it."""

    def tasks(self, split: str) -> int:
        return 30

    def reset(self, split: str, task: int) -> Prompt:
        return Prompt([task % 3], 3, stop_ids={3})

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        return Feedback(float(action.count(episode.prompt.tokens[0])))


class Even(Letters):
    """Only tasks with an even number tell answers apart."""

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        return Feedback(float(action[0]) * (episode.task % 2 == 0))


def collector(environment: Environment, **fields: Any) -> Collector:
    config = RolloutConfig(**{"prompts": 5, "completions": 6, "micro_batch_size": 4, **fields})
    scorer = Scorer(config, environment, TOKENIZER, print)

    @contextlib.contextmanager
    def sampling() -> Iterator[Engine]:
        yield Engine(Bigrams(1), CPU, sampled_logprobs=True)

    return Collector(config, environment, scorer, sampling, TOKENIZER, limit=8, seed=3, ranks=Ranks())


def test_prompts_come_in_the_computed_order_and_answers_are_numbered_from_the_start() -> None:
    order = Order(30, 3)
    for first in (0, 28):
        found = collector(Letters()).collect(first)
        assert [answer.id for answer in found.answers] == list(range(first * 6, (first + 5) * 6))
        expected = order.at(torch.arange(first, first + 5).numpy())[1].repeat(6)
        assert [answer.task for answer in found.answers] == expected.tolist()


def test_what_an_answer_draws_follows_from_the_seed_and_its_number() -> None:
    """As if it were generated alone."""
    for answer in collector(Letters(), temperature=1.5).collect(2).answers[::7]:
        engine = Engine(Bigrams(1), CPU, sampled_logprobs=True)
        request = engine.submit(
            answer.tokens[:1], max_new_tokens=3, sampling=Sampling(temperature=1.5), seed=mix(mix(3, answer.id), 0),
            stop_ids={3},
        )  # fmt: skip
        completion = dict(engine.completions())[request]
        assert completion.ids == answer.tokens[1:]
        assert completion.logprobs == pytest.approx(answer.logprobs, abs=1e-6)


def test_log_probabilities_are_of_the_distribution_that_was_sampled() -> None:
    model = Bigrams(1)
    for answer in collector(Letters(), temperature=0.5).collect(0).answers:
        for before, token, logprob in zip(answer.tokens, answer.tokens[1:], answer.logprobs, strict=False):
            assert logprob == pytest.approx(float((model.table[before] / 0.5).log_softmax(-1)[token]), abs=1e-5)


def test_dynamic_sampling_keeps_prompts_with_a_signal_in_order_and_counts_those_drawn() -> None:
    found = collector(Even(), dynamic_sampling=True, max_draws=6).collect(0)
    tasks = [answer.task for answer in found.answers[::6]]
    drawn = Order(30, 3).at(torch.arange(found.prompts).numpy())[1].tolist()
    assert len(tasks) == 5 and all(task % 2 == 0 for task in tasks)
    assert tasks == [task for task in drawn if task in tasks], "in the order of the prompts"
    assert 5 < found.prompts < 20
    assert 0.2 < found.without_signal < 0.8


def test_what_was_drawn_is_measured_over_all_answers_also_those_left_out() -> None:
    chosen = collector(Even(), dynamic_sampling=True, max_draws=6).collect(0)
    drawn = collector(Even(), prompts=chosen.prompts).collect(0)
    totals = [
        [sum(answer.total) for answer in drawn.answers[start : start + 6]] for start in range(0, 6 * drawn.prompts, 6)
    ]
    assert chosen.drawn_reward == drawn.drawn_reward == pytest.approx(sum(map(sum, totals)) / (6 * drawn.prompts))
    assert chosen.best_reward == drawn.best_reward == pytest.approx(sum(map(max, totals)) / drawn.prompts)
    kept = [sum(answer.total) for answer in chosen.answers]
    assert sum(kept) / len(kept) > chosen.drawn_reward


def test_dynamic_sampling_gives_up_and_fills_the_round_with_what_there_is() -> None:
    class Never(Letters):
        def step(self, episode: Episode, action: list[int]) -> Feedback:
            return Feedback(0.1 + 0.2)

    found = collector(Never(), dynamic_sampling=True, max_draws=3).collect(0)
    assert (len(found.answers), found.prompts, found.without_signal) == (30, 15, 1.0)


def test_an_answer_that_meets_no_stop_token_is_truncated() -> None:
    for answer in collector(Letters()).collect(0).answers:
        assert answer.truncated == (answer.tokens[-1] != 3)


def test_top_k_and_the_like_are_refused_where_their_log_probabilities_are_wanted() -> None:
    engine = Engine(Bigrams(1), CPU, sampled_logprobs=True)
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.9), Sampling(min_p=0.1), Sampling(repetition_penalty=1.1)):
        with pytest.raises(UserError, match="for a temperature alone"):
            engine.submit([1], max_new_tokens=1, sampling=sampling)


def test_an_episode_that_outgrows_the_limit_ends_as_truncated() -> None:
    class Endless(Letters):
        def step(self, episode: Episode, action: list[int]) -> Feedback:
            return Feedback(1.0, done=False, tokens=[0])

    episodes = [Episode("train", task, Endless().reset("train", task)) for task in range(3)]
    play(Engine(Bigrams(1), CPU), Endless(), episodes, limit=9)
    for episode in episodes:
        assert episode.truncated and len(episode.actions) >= 2
        assert len(episode.tokens) + 3 > 9 >= len(episode.tokens) - len(episode.feedback[-1].tokens)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match=re.escape("data.seq_len is 2; task") + ".* allowed: 3 or more"):
        check_prompts(Letters(), 3)
    check_prompts(Letters(), 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__batch_size": 12}, "data.batch_size is 12; allowed: a divisor of the round"),
        ({"training__batches_per_macro_batch": 6}, "batches_per_macro_batch is 6; allowed: a multiple of 4"),
        ({"rollouts__passes": 3}, "batches_per_macro_batch is 4; allowed: a multiple of 12"),
        ({"training__accumulation": 3}, "training.accumulation is 3; allowed: a divisor of the 4 batches of a round"),
        ({"saving__best": "lowest val_loss"}, "saving.best is 'lowest val_loss', which a policy does not have"),
        ({"model__dropout": 0.1}, "model.dropout is 0.1; allowed with rollouts: 0"),
        ({"rollouts__importance_cap": 2.0}, "rollouts.importance_cap is 2.0; allowed with old_logprobs sampled: None"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    policy: Callable[..., Experiment], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(policy(**fields))


def test_tensor_parallelism_and_dropout_of_adapters_are_refused(policy: Callable[..., Experiment]) -> None:
    with pytest.raises(UserError, match="allowed with rollouts: ddp, fsdp and hsdp"):
        check(policy(), Layout(tensor=2))
    tuned = policy(init_from="x", fine_tuning__lora=LoRAConfig(rank=2, dropout=0.5))
    with pytest.raises(UserError, match=r"fine_tuning.lora.dropout is 0.5; allowed with rollouts: 0"):
        check(tuned)


def test_a_corpus_without_tasks_is_refused(
    policy: Callable[..., Experiment], trainer: Callable[[Experiment], Trainer], workplace: Any
) -> None:
    (workplace / "input.txt").write_text("First Citizen: before we proceed any further, hear me speak. " * 200)
    with pytest.raises(UserError, match="objective GRPO needs a corpus with an environment; ShakespeareChar has none"):
        trainer(policy(corpus=ShakespeareChar(file="input.txt"), model__vocab_size=None))
