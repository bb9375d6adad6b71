"""Tokens that pad a model's embedding have no probability: not in sampling, nor in scores, KL, entropy and losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import Sampling
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import DPO, IPO, KTO, ORPO, Objective, SimPO
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.ppo import PPO
from tests.objectives.policies import random_batch
from tests.preferences import answers

VOCABULARY, PADDED = 6, 16
CPU = torch.device("cpu")
PAIRS: list[Objective] = [DPO(beta=0.5, sft_weight=1.0), IPO(beta=0.5), KTO(beta=0.5), ORPO(), SimPO()]
POLICIES: list[Objective] = [GRPO(kl_coef=0.1, entropy_coef=0.1), PPO(entropy_coef=0.1)]


def models(heads: Any = ()) -> tuple[LanguageModel, LanguageModel]:
    """A model, and one whose embedding has more rows, of large numbers."""
    torch.manual_seed(0)
    config = {"max_seq_len": 16, "n_layers": 1, "n_heads": 2, "dim": 8}
    plain, padded = (build_model(GPTConfig(vocab_size=size, **config), heads).eval() for size in (VOCABULARY, PADDED))
    weights = {name: torch.randn_like(weight) for name, weight in plain.state_dict().items()}
    plain.load_state_dict(weights)
    rows = 3 * torch.randn(PADDED - VOCABULARY, 8)
    weights["token_embedding.weight"] = torch.cat([weights["token_embedding.weight"], rows])
    padded.load_state_dict(weights)
    padded.scored_vocab = VOCABULARY
    return plain, padded


def loss_and_gradients(objective: Objective, model: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    total = objective(model, batch).total
    total.backward()
    return total.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def batch_for(objective: Objective) -> Batch:
    if objective.on_policy:
        batch, _ = random_batch()
        return batch.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    rows = answers([2, 3, 4, 1])
    seq = rows.targets.shape[1]
    extras = {"reference_logprobs": -torch.rand(4, seq), "desirable": torch.ones(4, seq, dtype=torch.int64),
              "kl": torch.zeros(4), "chosen_length": torch.ones(4)}  # fmt: skip
    return Batch(rows.inputs, rows.targets, extras, group=2)


@pytest.mark.parametrize("objective", [*PAIRS, *POLICIES], ids=lambda one: type(one).__name__)
def test_losses_and_gradients_are_those_without_padding(objective: Objective) -> None:
    batch = batch_for(objective)
    (loss, gradients), (padded_loss, padded_gradients) = (
        loss_and_gradients(objective, model, batch) for model in models(objective.heads)
    )
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-5)
    rows = padded_gradients["token_embedding.weight"]
    assert not rows[VOCABULARY:].any()
    padded_gradients["token_embedding.weight"] = rows[:VOCABULARY]
    torch.testing.assert_close(padded_gradients, gradients, rtol=1e-3, atol=1e-4)


def test_the_probabilities_of_all_tokens_add_up_to_one() -> None:
    """Those that scores, the sampler and greedy decoding report, by enumeration; and they are one distribution."""
    plain, padded = models()
    engine = Engine(padded, CPU, vocab_size=VOCABULARY)
    scored = torch.stack([row[-1] for row in engine.logprobs([[1, 2, token] for token in range(VOCABULARY)])])
    assert float(scored.exp().sum()) == pytest.approx(1, abs=1e-6)
    assert scored.tolist() == pytest.approx(plain(torch.tensor([[1, 2]]))[0, -1].log_softmax(-1).tolist(), abs=1e-5)
    assert padded.scored_vocab == VOCABULARY, "as it was before"
    for options in ({}, {"sampled_logprobs": True}):
        sampler = Engine(padded, CPU, vocab_size=VOCABULARY, **options)
        for sampling in (Sampling(seed=3), Sampling(temperature=0)):
            for completion in sampler.generate([[1, 2]] * 40, max_new_tokens=1, sampling=sampling):
                assert completion.logprobs[0] == pytest.approx(float(scored[completion.ids[0]]), abs=1e-5)


def test_the_entropy_is_that_of_the_tokens_that_can_be_sampled() -> None:
    plain, padded = models()
    tokens, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    found, expected = (model(tokens, targets=targets, scores=["entropy"]).entropy for model in (padded, plain))
    torch.testing.assert_close(found, expected)
    assert float(found.detach().max()) <= torch.log(torch.tensor(float(VOCABULARY)))
