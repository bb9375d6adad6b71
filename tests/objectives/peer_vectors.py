"""Writes peer_vectors.json: losses and gradients of TRL's trainers on random tensors, for `test_peer_vectors.py`.

    pip install trl==1.16.0
    python -m tests.objectives.peer_vectors

A trainer's own method is called with the little of a trainer that it reads, and a model that returns given tensors.
What TRL leaves out, or counts otherwise, is not here: conservative DPO (its `label_smoothing` is ignored), the sum of
IPO, and the cross-entropy in ORPO, which counts the prompt; those have their equations in `test_preference_losses.py`.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED
from tests.preferences import answers

FILE = Path(__file__).with_name("peer_vectors.json")
LENGTHS = [4, 2, 1, 5, 3, 3, 6, 2, 5, 4, 2, 7]
DESIRABLE = [True, False, True, True, False, False]


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def trainer(**fields: Any) -> SimpleNamespace:
    """What the losses read of `self`."""
    common = {
        "model": SimpleNamespace(training=True), "accelerator": Accelerator(), "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1,
        "use_weighting": False,
        "ld_alpha": None, "f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "precompute_ref_logps": True,
    }  # fmt: skip
    return SimpleNamespace(**common | fields)


def outputs(logprobs: Tensor) -> Any:
    """A model that returns per-token log-probabilities, as TRL's fused head does."""
    zeros = torch.zeros_like(logprobs)
    found = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **inputs: found


def given() -> dict[str, Tensor]:
    """Random log-probabilities `(rows, seq)` of model and reference, rewards and margins."""
    torch.manual_seed(4)
    shape = answers(LENGTHS).targets.shape
    return {
        "logprobs": -2 * torch.rand(shape), "reference": -2 * torch.rand(shape), "reward": torch.randn(shape),
        "margin": torch.rand(len(LENGTHS) // 2),
    }  # fmt: skip


def main() -> None:
    """Writes the file."""
    import trl
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    inputs, targets = given(), answers(LENGTHS).targets
    mask = targets != IGNORED
    halves = torch.cat([torch.arange(0, len(targets), 2), torch.arange(1, len(targets), 2)])
    cases: dict[str, Any] = {}

    def record(name: str, loss: Tensor, parameter: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, [parameter])
        cases[name] = {"loss": loss.item(), "gradient": gradient.tolist()}

    def policy() -> tuple[Tensor, Tensor]:
        parameter = inputs["logprobs"].clone().requires_grad_()
        return parameter, parameter.where(mask, 0.0)

    counted = torch.nn.functional.pad(mask.long(), (1, 0))[halves]
    reference = inputs["reference"].where(mask, 0.0).sum(-1)
    for name, losses, fields in (
        ("dpo", ["sigmoid"], {}), ("robust", ["robust"], {"label_smoothing": 0.2}), ("ipo", ["ipo"], {}),
        ("length_normalised", ["sigmoid_norm"], {}), ("with_sft", ["sigmoid", "sft"], {}),
    ):  # fmt: skip
        parameter, logprobs = policy()
        batch = {
            "input_ids": torch.zeros_like(counted), "attention_mask": torch.ones_like(counted),
            "completion_mask": counted, "ref_chosen_logps": reference[::2], "ref_rejected_logps": reference[1::2],
        }  # fmt: skip
        itself = trainer(beta=0.3, loss_types=losses, loss_weights=[1.0, 0.7][: len(losses)], **fields)
        record(name, DPOTrainer._compute_loss(itself, outputs(logprobs[halves]), batch, False), parameter)

    parameter, logprobs = policy()
    means = logprobs.sum(-1) / mask.sum(-1)
    itself = trainer(beta=2.0, simpo_gamma=0.5, alpha=0.0, loss_type="simpo")
    record("simpo", CPOTrainer.cpo_loss(itself, means[::2], means[1::2])[0].mean(), parameter)

    parameter, logprobs = policy()
    means = logprobs.sum(-1) / mask.sum(-1)
    odds, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.4), means[::2], means[1::2])
    record("orpo", (-means[::2] - odds).mean(), parameter)

    parameter, logprobs = policy()
    answered = {
        name: tensor[::2] for name, tensor in (("mask", mask), ("logprobs", logprobs), ("reference", reference))
    }
    counted = torch.nn.functional.pad(answered["mask"].long(), (1, 0))
    batch = {
        "input_ids": torch.zeros_like(counted), "attention_mask": torch.ones_like(counted), "completion_mask": counted,
        "label": torch.tensor(DESIRABLE), "ref_logps": reference[::2], "ref_KL_logps": reference[1::2],
    }  # fmt: skip
    itself = trainer(
        beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=0.8, undesirable_weight=1.5,
        _compute_kl_logps=lambda model, batch: logprobs.sum(-1)[1::2].detach(),
    )  # fmt: skip
    record("kto", KTOTrainer._compute_loss(itself, outputs(logprobs[::2]), batch, False), parameter)

    reward = inputs["reward"].clone().requires_grad_()
    last = torch.tensor([3 + length for length in LENGTHS])
    scores = reward[torch.arange(len(LENGTHS)), last][halves, None]
    itself = trainer(args=SimpleNamespace(center_rewards_coefficient=0.1))
    model = lambda **inputs: SimpleNamespace(logits=scores)  # noqa: E731
    batch = {"margin": inputs["margin"], "attention_mask": torch.ones(1)}
    record("reward_model", RewardTrainer.compute_loss(itself, model, batch), reward)

    content = {
        "trl": trl.__version__,
        "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
        "cases": cases,
    }
    FILE.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
