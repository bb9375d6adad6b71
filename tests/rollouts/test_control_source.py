"""Batches of a policy that acts in simulations: what a row holds, what follows it, and how it resumes."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.data.modalities import Modalities
from cleangpt.data.timesteps import ACTION, HIDDEN
from cleangpt.data.tokenizers import ByteTokenizer, ModalityTokenizer
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.acting import Acting
from cleangpt.environments.config import RolloutConfig
from cleangpt.environments.gymnasium import Gymnasium
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.gato import Gato, GatoConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.policy import PolicyObjective
from cleangpt.objectives.ppo import PPO
from cleangpt.rollouts.control_source import WORTH, ControlSource
from cleangpt.rollouts.rounds import Sizes
from tests.simulated import register

pytest.importorskip("gymnasium")
TOKENIZER = ModalityTokenizer(ByteTokenizer(), Modalities(bins=64, choices=4))
SEQ_LEN = 60
"""9 steps of CartPole, 6 tokens each, and the observation after them."""
VISION = VisionConfig(encoder="linear", height=8, width=8, patch_size=4)
PPO_ = PPO(gamma=0.9, lam=0.8, whiten=False)


def opened(
    name: str = "CartPole-v1", objective: PolicyObjective = PPO_, see_actions: bool = True,
    tokenizer: ModalityTokenizer = TOKENIZER, **fields: Any,
) -> ControlSource:  # fmt: skip
    torch.manual_seed(0)
    config = GatoConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=SEQ_LEN, n_layers=1, n_heads=2, dim=16,
        vector=tokenizer.modalities.vector, vision=VISION if name == "Window-v0" else VisionConfig(),
    )  # fmt: skip
    policy = build_model(config, {"value"})
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.3)
    environment = Gymnasium(
        name, tokenizer, acting=Acting(see_actions=see_actions), expert_return=500.0, random_return=20.0
    )
    rollouts = RolloutConfig(**({"prompts": 16, "completions": 1, "passes": 2, "micro_batch_size": 8} | fields))
    return ControlSource(
        rollouts, objective, environment, policy, Sizes(8, 1, 1), seq_len=SEQ_LEN, seed=3, ranks=Ranks(),
        device=torch.device("cpu"), autocast=contextlib.nullcontext(),
    )  # fmt: skip


def rounds(source: ControlSource, batches: int) -> list[Batch]:
    return [source.next() for _ in range(batches)]


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(one.inputs, other.inputs), (one.extras, other.extras), ({"": one.targets}, {"": other.targets})]
    return all(
        left.keys() == right.keys() and all(map(torch.equal, left.values(), right.values())) for left, right in pairs
    )


@pytest.mark.parametrize("see_actions", [True, False])
def test_the_learner_reads_what_the_agent_read_and_scores_as_it_sampled(see_actions: bool) -> None:
    source = opened(see_actions=see_actions)
    for batch in rounds(source, 2):
        scores = source.policy(**batch.inputs, targets=batch.targets)
        mask = batch.targets != IGNORED
        assert torch.allclose(scores.logprobs[mask], batch.extras["old_logprobs"][mask], atol=1e-5)
        places = batch.inputs["places"]
        assert ((places == (ACTION if see_actions else HIDDEN)).sum(1) >= mask.sum(1) - 1).all()
        assert (batch.extras["old_logprobs"][mask] < 0).all()
    assert isinstance(source.policy, Gato)


def test_advantages_are_those_of_whole_stretches_with_the_value_of_what_follows() -> None:
    source = opened()
    source.next()
    steps, rows = source.steps, source.rows
    tokens, mask = rows["tokens"].long(), rows["mask"]
    values = source.policy(tokens[:, :-1], places=rows["places"].long()[:, :-1], scores=["value"]).heads["value"]
    step = WORTH / 480  # CartPole rewards each step by 1
    seen_both = set()
    for row in range(len(tokens)):
        taken = int(mask[row].sum())
        at = [steps.size * number + steps.size - 2 for number in range(taken)]  # columns of actions' targets
        assert torch.equal(torch.nonzero(mask[row])[:, 0], torch.tensor(at))
        goes_on = bool(tokens[row, taken * steps.size :].any())
        seen_both.add(goes_on)
        bootstrap = values[row, at[-1] + steps.size].item() if goes_on else 0.0
        own = [values[row, column].item() for column in at]
        advantage, expected = 0.0, []
        for number in reversed(range(taken)):
            after = own[number + 1] if number + 1 < taken else bootstrap
            advantage = step + 0.9 * after - own[number] + 0.9 * 0.8 * (advantage if number + 1 < taken else 0.0)
            expected.insert(0, advantage)
        assert rows["advantages"][row, at].tolist() == pytest.approx(expected, abs=1e-4)
        assert rows["returns"][row, at].tolist() == pytest.approx(np.add(expected, own), abs=1e-4)
    assert seen_both == {True, False}


def test_stretches_continue_an_episode_where_the_last_ended() -> None:
    source = opened(prompts=8, passes=1)
    first, second = (source.next() and source.rows["tokens"].clone() for _ in range(2))
    observed = source.steps.observation_size
    continued = 0
    for row in range(8):
        length = int(torch.nonzero(first[row])[-1]) + 1
        if length % source.steps.size == observed:  # the observation after the last action
            assert torch.equal(first[row, length - observed : length], second[row, :observed])
            continued += 1
    assert continued > 0


@pytest.mark.default(1)
@pytest.mark.parametrize("before", [1, 3, 4, 6])
def test_a_resumed_source_goes_on_bit_for_bit_in_the_middle_of_a_round_too(before: int) -> None:
    source, again = opened(), opened()
    rounds(source, before)
    again.load_state_dict(source.state_dict())
    assert all(equal(source.next(), again.next()) for _ in range(6))
    assert (
        source.metrics() == again.metrics() and source.state_dict()["simulations"] == again.state_dict()["simulations"]
    )


def test_every_row_is_in_each_pass_once() -> None:
    source = opened()
    batches = rounds(source, 4)
    for half in (batches[:2], batches[2:]):
        found = sorted(str(row.tolist()) for batch in half for row in batch.inputs["tokens"])
        assert found == sorted(str(row[:-1].tolist()) for row in source.rows["tokens"])
    assert batches[0].extras["fresh"].all() and not batches[1].extras["fresh"].any()


def test_returns_of_finished_episodes_are_told() -> None:
    source = opened(prompts=64, passes=1)
    source.next()
    metrics = source.metrics()
    assert 8 < metrics["train_return"] == metrics["train_episode_length"] < 80
    assert metrics["train_environment_steps"] == float(source.rows["mask"].sum())


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (GRPO(), {}, "allowed in simulations: PPO"),
        (PPO(kl_coef=0.1), {}, "allowed in simulations: PPO"),
        (PPO_, {"save_answers": True}, "save_answers is True; allowed in simulations: False"),
        (PPO_, {"prompts": 12}, "micro_batch_size is 8; allowed in simulations: a divisor"),
    ],
)
def test_what_simulations_cannot_do_is_refused(objective: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(objective=objective, **fields)


def test_continuous_actions_are_sampled_and_scored() -> None:
    source = opened("MountainCarContinuous-v0")
    batch = source.next()
    scores = source.policy(**batch.inputs, targets=batch.targets)
    mask = batch.targets != IGNORED
    assert torch.allclose(scores.logprobs[mask], batch.extras["old_logprobs"][mask], atol=1e-5)


def test_images_and_vectors_are_learned_from_as_they_were_seen() -> None:
    modalities = Modalities(bins=4, choices=4, vector=2, image_height=8, image_width=8, image_tokens=4)
    tokenizer = ModalityTokenizer(ByteTokenizer(), modalities)
    source, again = (opened(register(), tokenizer=tokenizer, prompts=8) for _ in range(2))
    for _ in range(2):
        batch = source.next()
        assert batch.inputs["images"].shape[2:] == (8, 8, 3) and batch.inputs["vectors"].shape[2:] == (2,)
        scores, mask = source.policy(**batch.inputs, targets=batch.targets), batch.targets != IGNORED
        assert torch.allclose(scores.logprobs[mask], batch.extras["old_logprobs"][mask], atol=1e-5)
    again.load_state_dict(source.state_dict())
    assert all(equal(source.next(), again.next()) for _ in range(3))
