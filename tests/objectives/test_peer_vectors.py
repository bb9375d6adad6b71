"""Losses on preferences equal TRL's, in value and gradient, on the tensors of `peer_vectors.json`."""

import json
from typing import Any

import pytest
import torch

from cleangpt.data.batch import Batch
from cleangpt.objectives import DPO, IPO, KTO, ORPO, Objective, RewardModel, SimPO
from cleangpt.objectives.step_means import with_step_means
from tests.objectives.peer_vectors import DESIRABLE, FILE, LENGTHS
from tests.preferences import Given, answers

OURS: dict[str, Objective] = {
    "dpo": DPO(beta=0.3),
    "robust": DPO(beta=0.3, label_smoothing=0.2, robust=True),
    "ipo": IPO(beta=0.3),
    "length_normalised": DPO(beta=0.3, length_normalised=True),
    "with_sft": DPO(beta=0.3, sft_weight=0.7),
    "simpo": SimPO(beta=2.0, gamma=0.5),
    "orpo": ORPO(weight=0.4),
    "kto": KTO(beta=0.3, desirable_weight=0.8, undesirable_weight=1.5),
    "reward_model": RewardModel(centring=0.1),
}
PEER: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


def test_every_case_has_its_objective() -> None:
    assert PEER["cases"].keys() == OURS.keys() and PEER["trl"] == "1.16.0"


@pytest.mark.parametrize("name", OURS)
def test_it_equals_trl(name: str) -> None:
    inputs = {key: torch.tensor(values) for key, values in PEER["inputs"].items()}
    shape = inputs["logprobs"].shape
    rows = answers(LENGTHS)
    rows.extras = {
        "reference_logprobs": inputs["reference"],
        "margin": inputs["margin"].repeat_interleave(2)[:, None].expand(shape),
        "desirable": torch.tensor(DESIRABLE).long().repeat_interleave(2)[:, None].expand(shape),
    }
    model, objective = Given(inputs["logprobs"], inputs["reward"]), OURS[name]
    count = objective.count(rows)
    (batch,) = with_step_means(objective, model, [rows], [rows], count, lambda total: total)  # type: ignore[arg-type]
    assert isinstance(batch, Batch)
    loss = objective(model, batch).total / count  # type: ignore[arg-type]
    parameter = model.reward if name == "reward_model" else model.logprobs
    (gradient,) = torch.autograd.grad(loss, [parameter])
    expected = torch.tensor(PEER["cases"][name]["gradient"])
    torch.testing.assert_close(loss.item(), PEER["cases"][name]["loss"], rtol=1e-6, atol=0)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
