"""An agent in simulations: the same actions however its context is read, whoever is beside it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cleangpt.data.modalities import Box, Dict, Discrete, Ids, Image, Modalities, Space, TokenRanges
from cleangpt.data.timesteps import ACTION, HIDDEN, Timesteps
from cleangpt.environments.acting import Acting
from cleangpt.errors import UserError
from cleangpt.models.gato import Gato, GatoConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.rollouts.agent import Agent, Context

CPU = torch.device("cpu")
RANGES = TokenRanges(8, Modalities(bins=32, choices=6))
MIXED = Dict((("turn", Discrete((4,))), ("push", Box((2,), (-1.0, -1.0), (1.0, 1.0)))))


def small_model(max_seq_len: int = 40, **fields: Any) -> Gato:
    torch.manual_seed(1)
    config = GatoConfig(
        vocab_size=RANGES.vocab_size, max_seq_len=max_seq_len, n_layers=2, n_heads=2, dim=16, n_places=16, **fields
    )
    model = Gato(config).eval()
    for parameter in model.parameters():  # so that its distributions are not nearly uniform
        parameter.data *= 4
    return model


def contexts(lengths: list[int]) -> list[Context]:
    return [Context.of(np.arange(length) % 8) for length in lengths]


def observations(step: int, rows: list[int]) -> NDArray[np.float64]:
    return np.array([[math.sin(step + row), row + 0.1 * step, -step] for row in rows])


def act(agent: Agent, rows: list[int], steps: int) -> list[list[Any]]:
    """The tokens of all actions of each row."""
    found: list[list[Any]] = [[] for _ in rows]
    for step in range(steps):
        agent.act(observations(step, rows))
        size = agent.steps.action.size
        for row, end in enumerate(agent.lengths):
            found[row].append(agent.tokens[row, end - size : end].tolist())
    return found


@pytest.mark.default(4)
@pytest.mark.parametrize("action", [Discrete((4,)), MIXED], ids=["one token", "three tokens"])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [3, 0, 5]], ids=["even", "uneven"])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("acting", [Acting(), Acting(numbers="sample", see_actions=False)], ids=["seeing", "blind"])
def test_actions_with_a_cache_are_those_of_reading_everything_again(
    action: Space, lengths: list[int], window: int | None, acting: Acting
) -> None:
    model, steps = small_model(sliding_window=window), Timesteps(RANGES, Box((3,)), action)
    agents = [Agent(model, CPU, steps, acting, contexts(lengths), [5, 6, 7], cached=cached) for cached in (True, False)]
    cached, read_again = (act(agent, [0, 1, 2], 20) for agent in agents)
    assert cached == read_again
    assert len({str(tokens) for row in cached for tokens in row}) > 3


@pytest.mark.parametrize("vector", [1, 2], ids=["two vectors", "one vector"])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [3, 0, 5]], ids=["even", "uneven"])
def test_images_and_vectors_are_read_with_a_cache_as_without(lengths: list[int], vector: int) -> None:
    seen = Dict((("view", Image(4, 4, 4)), ("speed", Box((2,)))))
    ranges = TokenRanges(8, Modalities(bins=32, choices=6, vector=vector))
    steps = Timesteps(ranges, seen, Discrete((4,)))
    model = small_model(vector=vector, vision=VisionConfig(encoder="linear", height=4, width=4, patch_size=2))
    random = np.random.default_rng(0)
    pictures, speeds = random.integers(0, 256, (15, 3, 4, 4, 3)).astype(np.uint8), random.normal(size=(15, 3, 2))
    chosen = []
    for cached in (True, False):
        agent = Agent(model, CPU, steps, Acting(choices="argmax"), contexts(lengths), [5, 6, 7], cached=cached)
        actions = [agent.act({"view": pictures[step], "speed": speeds[step]}) for step in range(15)]
        chosen.append(np.array(actions).tolist())
        last = steps.encode({"view": pictures[-3:, 1], "speed": speeds[-3:, 1]}, np.zeros(3, int), np.ones(3, bool))
        for name, records in agent.records[1].items():
            expected, begun = last.placed()[name], int(agent.lengths[1]) - 3 * steps.size
            last_of = slice(-len(expected.ends), None)
            assert np.array_equal(records.values[last_of], expected.values)
            assert np.array_equal(records.ends[last_of], expected.ends + begun)
    assert chosen[0] == chosen[1] and len({str(row) for row in chosen[0]}) > 3


def test_an_episode_that_outgrows_the_context_forgets_its_older_half() -> None:
    model, steps = small_model(), Timesteps(RANGES, Box((3,)), Discrete((4,)))
    agent = Agent(model, CPU, steps, Acting(), contexts([5]), [1])
    room = (40 - 5) // steps.size
    history = list[int]()
    kept, longest = 0, 0
    for step in range(50):
        if kept + 1 > room:
            kept = room // 2
        agent.act(observations(step, [0]))
        kept += 1
        history += agent.tokens[0, agent.lengths[0] - steps.size : agent.lengths[0]].tolist()
        expected = [*range(5), *history[-kept * steps.size :]]
        assert agent.tokens[0, : agent.lengths[0]].tolist() == expected
        longest = max(longest, int(agent.lengths[0]))
    assert longest <= 40 and agent.tokens.shape == (1, 40)


def test_a_row_acts_as_if_it_were_alone() -> None:
    model, steps = small_model(), Timesteps(RANGES, Box((3,)), MIXED)
    acting = Acting(numbers="sample")
    together = act(Agent(model, CPU, steps, acting, contexts([2, 4, 0]), [5, 6, 7]), [0, 1, 2], 12)
    for row, length in enumerate([2, 4, 0]):
        alone = Agent(model, CPU, steps, acting, contexts([length]), [5 + row])
        assert act(alone, [row], 12) == [together[row]]


def test_rows_that_end_leave_the_others_as_they_were() -> None:
    model, steps = small_model(), Timesteps(RANGES, Box((3,)), Discrete((4,)))
    whole = act(Agent(model, CPU, steps, Acting(), contexts([0, 3, 1]), [5, 6, 7]), [0, 1, 2], 10)
    agent = Agent(model, CPU, steps, Acting(), contexts([0, 3, 1]), [5, 6, 7])
    begun = act(agent, [0, 1, 2], 4)
    agent.keep([0, 2])
    for step in range(4, 10):
        agent.act(observations(step, [0, 2]))
        for row, of in enumerate([0, 2]):
            begun[of].append(agent.tokens[row, agent.lengths[row] - 1 : agent.lengths[row]].tolist())
    assert begun[0] == whole[0] and begun[2] == whole[2]


def test_another_seed_acts_otherwise() -> None:
    model, steps = small_model(), Timesteps(RANGES, Box((3,)), Discrete((4,)))
    one, same, other = (act(Agent(model, CPU, steps, Acting(), contexts([0]), [seed]), [0], 10) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("see_actions", [True, False])
def test_the_agent_reads_what_a_row_of_the_dataset_has(see_actions: bool) -> None:
    model, steps = small_model(), Timesteps(RANGES, Box((3,)), Discrete((4,)))
    agent = Agent(model, CPU, steps, Acting(see_actions=see_actions), contexts([2]), [1])
    actions = np.array([agent.act(observations(step, [0]))[0] for step in range(5)])
    seen = np.concatenate([observations(step, [0]) for step in range(5)])
    expected = steps.encode(seen, actions, np.ones(5, bool), hidden=not see_actions)
    assert agent.tokens[0, 2 : agent.lengths[0]].tolist() == expected.tokens.reshape(-1).tolist()
    assert agent.places[0, 2 : agent.lengths[0]].tolist() == expected.places.reshape(-1).tolist()
    assert (ACTION if see_actions else HIDDEN) in agent.places[0]


@pytest.mark.parametrize(
    ("numbers", "bin_"), [("mean", 15), ("median", 2), ("argmax", 31)], ids=["mean", "median", "argmax"]
)
def test_numbers_are_chosen_as_asked(numbers: Any, bin_: int) -> None:
    probabilities = np.zeros(32)
    probabilities[[0, 2, 31]] = [0.25, 0.3, 0.45]
    values = (np.arange(32) + 0.5) / 16 - 1
    expected = {"mean": int((probabilities @ values + 1) * 16), "median": 2, "argmax": 31}
    logits = torch.full((1, RANGES.vocab_size), 9.0)
    logits[0, 8:40] = torch.from_numpy(np.log(probabilities + 1e-30))
    steps = Timesteps(RANGES, Box((3,)), Box((1,), (-1.0,), (1.0,)))
    agent = Agent(small_model(), CPU, steps, Acting(numbers=numbers), contexts([0]), [1])
    tokens, logprobs = agent._choose(logits, Ids(8, 40, numeric=True))
    assert tokens[0] - 8 == expected[numbers] == bin_
    assert logprobs[0] == pytest.approx(math.log(probabilities[bin_] + 1e-30), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_choices_are_sampled_among_the_tasks_own_at_the_temperature(temperature: float) -> None:
    logits = torch.zeros(4000, RANGES.vocab_size)
    logits[:, 40:43] = torch.tensor([0.0, 1.0, 2.0])
    logits[:, 43:] = 50.0
    steps = Timesteps(RANGES, Box((3,)), Discrete((3,)))
    agent = Agent(small_model(), CPU, steps, Acting(temperature=temperature), contexts([0] * 4000), [*range(4000)])
    tokens, _ = agent._choose(logits, steps.action.ids(RANGES, action=True)[0])
    expected = (torch.tensor([0.0, 1.0, 2.0]) / temperature).softmax(-1)
    assert np.bincount(tokens - 40, minlength=3) / 4000 == pytest.approx(expected.numpy(), abs=0.03)


def test_a_context_without_room_for_a_step_is_refused() -> None:
    steps = Timesteps(RANGES, Box((3,)), Discrete((4,)))
    with pytest.raises(UserError, match="reads 7 tokens; allowed: 8 or more"):
        Agent(small_model(7), CPU, steps, Acting(), contexts([3]), [1])
