"""Simulations of Gymnasium: their spaces as ours, the contract of environments, what is refused."""

import builtins
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cleangpt.data.modalities import Box, Dict, Discrete, Modalities, TokenRanges
from cleangpt.data.timesteps import Timesteps
from cleangpt.data.tokenizers import ByteTokenizer, ModalityTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.environments.base import Episode
from cleangpt.environments.experts import EXPERTS, record
from cleangpt.environments.gymnasium import OF_ACTIONS, Gymnasium, convert, item, make, spaces, split_text
from cleangpt.errors import UserError
from cleangpt.models.gato import Gato, GatoConfig
from cleangpt.rollouts.simulating import play_control

gymnasium = pytest.importorskip("gymnasium")
TOKENIZER = ModalityTokenizer(ByteTokenizer(), Modalities(bins=64, choices=8))


def simulated(name: str = "CartPole-v1", **fields: Any) -> Gymnasium:
    return Gymnasium(name, TOKENIZER, **({"expert_return": 500.0, "random_return": 20.0, "episodes": 6} | fields))


def policy(max_seq_len: int = 60) -> Gato:
    torch.manual_seed(0)
    return Gato(
        GatoConfig(vocab_size=TOKENIZER.vocab_size, max_seq_len=max_seq_len, n_layers=1, n_heads=2, dim=16)
    ).eval()


# Spaces ---------------------------------------------------------------------------------------------------------------
def test_spaces_are_converted() -> None:
    kinds = gymnasium.spaces
    action = kinds.Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32))
    assert convert(action, OF_ACTIONS) == Box((2,), (-1.0, -2.0), (1.0, 2.0)) and convert(action) == Box((2,))
    assert convert(kinds.Box(-np.inf, np.inf, (2, 3)), OF_ACTIONS) == Box((2, 3))
    assert convert(kinds.Box(0, 10, (2,), np.uint8)) == Discrete((11, 11), (2,), (0, 0))
    assert convert(kinds.Discrete(3, start=2)) == Discrete((3,), (), (2,))
    assert convert(kinds.MultiDiscrete([3, 4])) == Discrete((3, 4), (2,), (0, 0))
    assert convert(kinds.MultiBinary(2)) == Discrete((2, 2), (2,), boolean=True)
    nested = kinds.Dict(a=kinds.Discrete(2), said=kinds.Text(9), b=kinds.Tuple([kinds.Discrete(3), kinds.Discrete(4)]))
    parts = dict(convert(nested).parts)  # type: ignore[attr-defined]
    assert parts == {
        "a": Discrete((2,), (), (0,)),
        "b": Dict((("0", Discrete((3,), (), (0,))), ("1", Discrete((4,), (), (0,))))),
    }
    with pytest.raises(UserError, match="allowed: Box, Discrete"):
        convert(kinds.Sequence(kinds.Discrete(2)))


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Box(-2, 2, (2, 3)),
        gymnasium.spaces.Discrete(5, start=-2),
        gymnasium.spaces.MultiDiscrete([3, 4]),
        gymnasium.spaces.MultiBinary(3),
        gymnasium.spaces.Dict(z=gymnasium.spaces.Discrete(3), a=gymnasium.spaces.Box(-1, 1, (2,))),
    ],
    ids=lambda space: type(space).__name__,
)
def test_a_decoded_action_is_one_that_the_simulation_takes(space: Any) -> None:
    ours = convert(space, OF_ACTIONS)
    space.seed(1)
    batch = ours.stack([space.sample() for _ in range(5)])
    tokens = ours.encode(batch, TOKENIZER.ranges, action=True)
    decoded = ours.decode(tokens, TOKENIZER.ranges, action=True)
    assert np.array_equal(ours.encode(decoded, TOKENIZER.ranges, action=True), tokens)
    for row in range(5):
        value = item(decoded, row)
        if isinstance(space, gymnasium.spaces.Dict):
            assert set(value) == {"a", "z"} and space["z"].contains(value["z"])
        elif isinstance(space, gymnasium.spaces.Box):
            assert space.contains(np.asarray(value, np.float32))
        else:
            assert space.contains(np.asarray(value, space.dtype) if np.ndim(value) else value)


def test_numbers_of_observations_are_scaled_by_their_bounds_where_asked() -> None:
    seen, _ = spaces("Pendulum-v1", modalities=Modalities(scale="bounds"))
    assert seen == Box((3,), (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0))
    assert spaces("Pendulum-v1")[0] == Box((3,))
    assert spaces("CartPole-v1", modalities=Modalities(scale="bounds"))[0] == Box((4,))  # velocities have none


def test_numbers_of_observations_are_left_as_they_are_where_asked() -> None:
    modalities = Modalities(scale="none", vector=5)
    steps = Timesteps(TokenRanges(8, modalities), *spaces("CartPole-v1", modalities=modalities))
    vector = steps.observe(np.array([[0.25, -0.5, 3.0, -4.0]])).records["vectors"]
    assert vector.tolist() == [[[0.25, -0.5, 1.0, -1.0, 0.0]]]


def test_texts_are_taken_out_of_observations() -> None:
    observation = {"mission": "go", "image": 3, "also": {"note": "now", "x": 1}, "pair": (4, 5)}
    text, rest = split_text(observation)
    assert text == "now go" and rest == {"image": 3, "also": {"x": 1}, "pair": {"0": 4, "1": 5}}
    assert split_text(7) == ("", 7)


# The contract ---------------------------------------------------------------------------------------------------------
def test_an_episode_by_the_contract_is_that_of_playing_on() -> None:
    environment = simulated()
    prompt = environment.reset("val", 3)
    assert prompt == environment.reset("val", 3) != environment.reset("val", 4) != environment.reset("train", 4)
    simulation = environment.make()
    observation, _ = simulation.reset(seed=environment.start_seed("val", 3))
    episode, steps = Episode("val", 3, prompt), environment.steps
    choice = steps.action.ids(steps.ranges, action=True)[0].first
    while True:
        seen = steps.observe(steps.observation.stack([observation])).tokens[0].tolist()
        assert (episode.feedback[-1].tokens if episode.feedback else prompt.tokens) == seen
        action = [choice + len(episode.actions) % 2]
        feedback = environment.step(episode, action)
        observation, reward, terminated, truncated, _ = simulation.step(action[0] - choice)
        episode.actions.append(action)
        episode.feedback.append(feedback)
        assert feedback.reward == reward and feedback.done == (terminated or truncated)
        if feedback.done:
            return


@pytest.mark.parametrize("name", ["CartPole-v1", "MountainCarContinuous-v0"])
def test_playing_in_step_is_playing_one_by_one(name: str) -> None:
    environment, model = simulated(name, arguments=(("max_episode_steps", 20),)), policy()
    together = play_control(model, environment, "val", range(4), torch.device("cpu"))
    alone = [play_control(model, environment, "val", [task], torch.device("cpu"))[0] for task in range(4)]
    for one, other in zip(together, alone, strict=True):
        assert (one.length, one.success) == (other.length, other.success)
        assert one.total == pytest.approx(other.total, rel=1e-3)
        assert one.score == pytest.approx(environment.score(one.total)) and 0 < one.length <= 20
    assert together == play_control(model, environment, "val", range(4), torch.device("cpu"))
    assert len({one.seed for one in together}) == 4


def test_an_agent_reads_its_prompt_before_an_episode() -> None:
    arguments = (("max_episode_steps", 12),)
    environment, model = simulated("MountainCarContinuous-v0", arguments=arguments), policy()
    for parameter in model.parameters():  # so that its distributions are not nearly uniform
        parameter.data *= 5
    steps = environment.steps
    prompt = steps.encode(np.array([[-0.5, 0.06]] * 3), np.array([[1.0]] * 3), np.ones(3, bool))
    prompted = simulated("MountainCarContinuous-v0", arguments=arguments, prompts=[prompt])
    plain, other = (play_control(model, one, "val", range(2), torch.device("cpu")) for one in (environment, prompted))
    assert [one.seed for one in plain] == [one.seed for one in other]
    assert all(one.total != two.total for one, two in zip(plain, other, strict=True))
    long = steps.encode(np.zeros((14, 2)), np.zeros((14, 1)), np.ones(14, bool))
    with pytest.raises(UserError, match="allowed: 60 or more, a text, a prompt and a step"):
        play_control(policy(59), simulated("MountainCarContinuous-v0", prompts=[long]), "val", [0], torch.device("cpu"))


def test_success_is_what_the_simulation_says_or_its_threshold() -> None:
    environment, simulation = simulated(), make("CartPole-v1")
    assert environment.succeeded(simulation, 475, {}) and not environment.succeeded(simulation, 474, {})
    assert environment.succeeded(simulation, 0, {"success": 1.0}) and not environment.succeeded(
        simulation, 500, {"is_success": False}
    )
    pendulum = simulated("Pendulum-v1", expert_return=-150.0)
    assert pendulum.succeeded(make("Pendulum-v1"), -149, {}) and not pendulum.succeeded(make("Pendulum-v1"), -151, {})


# Experts --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "least"),
    [("CartPole-v1", 500), ("Acrobot-v1", -110), ("MountainCar-v0", -130), ("MountainCarContinuous-v0", 88),
     ("Pendulum-v1", -250)],
)  # fmt: skip
def test_experts_reach_their_returns(name: str, least: float) -> None:
    simulation = make(name)
    returns = [sum(record(simulation, EXPERTS[name], seed)[2]) for seed in range(8)]
    assert np.mean(returns) >= least


def test_a_recording_is_deterministic_and_marks_noise() -> None:
    simulation = make("CartPole-v1")
    one, same, other = (record(simulation, EXPERTS["CartPole-v1"], seed, noise=0.1) for seed in (1, 1, 2))
    assert str(one) == str(same) != str(other)
    observations, actions, rewards, own, _ = one
    assert len(observations) == len(actions) + 1 == len(rewards) + 1 == len(own) + 1 and not all(own)
    for observation, action, learned in zip(observations, actions, own, strict=False):
        assert not learned or action == EXPERTS["CartPole-v1"](simulation, observation)
    assert not any(record(simulation, EXPERTS["CartPole-v1"], 1, noise=1.0)[3])


# What is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("CartPol-v1", (), "'CartPol-v1' cannot be made: .*did you mean 'CartPole"),
        ("CartPole-v99", (), "cannot be made"),
        ("not a name", (), "cannot be made"),
        ("CartPole-v1", (("height", 3),), "does not take {'height': 3}"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spaces(name, arguments)


def test_without_gymnasium_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("gymnasium"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *rest)

    for name in [name for name in sys.modules if name.split(".")[0] == "gymnasium"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UserError, match="pip install gymnasium"):
        make("CartPole-v1")


def test_acting_is_checked() -> None:
    with pytest.raises(UserError, match=r"corpus\.acting\.numbers is 'best'"):
        Acting(numbers="best")  # type: ignore[arg-type]
