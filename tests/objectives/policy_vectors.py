"""Writes policy_vectors.json: losses and gradients of TRL's trainers on random tensors, for `test_policy_vectors.py`.

    pip install trl==1.16.0
    pip install --no-deps --target old trl==0.11.4
    python -m tests.objectives.policy_vectors
    PYTHONPATH=old:. python -m tests.objectives.policy_vectors ppo

TRL 1.16 has no PPO any more, so that comes from the last version whose trainer has it as methods. A trainer's own
method is called with the little of a trainer that it reads, and log-probabilities that are given.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("policy_vectors.json")
LENGTHS = [3, 5, 1, 4]
"""Of the answers, in rows of 5 tokens."""
LONGEST = 5


def given() -> dict[str, Tensor]:
    """Random log-probabilities and values `(rows, seq)`, advantages and rewards `(rows,)`, and the mask."""
    torch.manual_seed(11)
    shape = (len(LENGTHS), LONGEST)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).float()
    old = -2 * torch.rand(shape)
    return {
        "mask": mask, "old": old,
        "logprobs": old + 0.3 * torch.randn(shape), "reference": old + 0.3 * torch.randn(shape),
        "advantages": torch.tensor([1.5, -0.7, 0.4, -1.2]), "rewards": torch.tensor([1.0, -0.5, 2.0, 0.25]),
        "values": torch.randn(shape), "old_values": torch.randn(shape), "returns": torch.randn(shape),
        "token_advantages": torch.randn(shape),
    }  # fmt: skip


class Accelerator:
    """One process."""

    num_processes, sync_gradients = 1, True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


def trainer(**fields: Any) -> SimpleNamespace:
    """What TRL 1.16's losses read of `self`."""
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=fields.pop("bias_correction", False), steps_per_generation=1
    )
    common = {
        "model": SimpleNamespace(training=True), "accelerator": Accelerator(), "aux_loss_enabled": False, "args": args,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "use_vllm": False, "loss_type": "grpo",
        "current_gradient_accumulation_steps": 1, "max_completion_length": LONGEST, "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)), "vllm_importance_sampling_correction": False,
    }  # fmt: skip
    return SimpleNamespace(**common | fields)


CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "grpo_kl": {"beta": 0.1, "bias_correction": True},
}


def losses() -> dict[str, Any]:
    """TRL 1.16's GRPO family and RLOO."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    found = {}
    for name, fields in {**CASES, "rloo": {}}.items():
        tensors = given()
        logprobs = tensors["logprobs"].clone().requires_grad_()
        own = trainer(**fields)
        own._get_per_token_logps_and_entropies = lambda *_, out=logprobs, **__: (out, torch.zeros_like(out), None)
        prompt = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
        inputs = {
            "prompt_ids": prompt, "prompt_mask": prompt + 1, "completion_ids": torch.zeros_like(tensors["mask"]).long(),
            "completion_mask": tensors["mask"], "advantages": tensors["advantages"],
            "old_per_token_logps": tensors["old"], "ref_per_token_logps": tensors["reference"],
            "old_logps": (tensors["old"] * tensors["mask"]).sum(1), "num_items_in_batch": tensors["mask"].sum(),
        }  # fmt: skip
        method = RLOOTrainer._compute_loss if name == "rloo" else GRPOTrainer._compute_loss
        loss = method(own, None, inputs)
        loss.backward()
        assert logprobs.grad is not None
        found[name] = {"loss": loss.item(), "gradient": logprobs.grad.tolist()}
    return found


def ppo() -> dict[str, Any]:
    """TRL 0.11.4's PPO: rewards with the KL term, advantages, and the loss."""
    from trl.trainer.ppo_trainer import PPOTrainer

    tensors = given()
    mask = tensors["mask"]
    own = SimpleNamespace(
        kl_ctl=SimpleNamespace(value=0.1),
        config=SimpleNamespace(
            use_score_scaling=False, gamma=0.95, lam=0.9, whiten_rewards=False, cliprange=0.2, cliprange_value=0.2,
            vf_coef=0.5, ratio_threshold=1e9, kl_penalty="kl",
        ),
    )  # fmt: skip
    own._kl_penalty = lambda logprob, ref: logprob - ref
    rewards, _, _ = PPOTrainer.compute_rewards(own, tensors["rewards"], tensors["old"], tensors["reference"], mask)
    _, advantages, returns = PPOTrainer.compute_advantages(own, tensors["values"].clone(), rewards, mask.clone())
    logprobs, values = (tensors[name].clone().requires_grad_() for name in ("logprobs", "values"))
    policy, value, _ = PPOTrainer.loss(
        own, tensors["old"], tensors["old_values"], torch.zeros(*mask.shape, 3), values, logprobs, mask,
        tensors["token_advantages"], tensors["returns"],
    )  # fmt: skip
    (policy + value).backward()
    assert logprobs.grad is not None and values.grad is not None
    return {
        "ppo_advantages": {"advantages": advantages.tolist(), "returns": returns.tolist()},
        "ppo": {
            "loss": (policy + value).item(), "gradient": logprobs.grad.tolist(), "value_gradient": values.grad.tolist()
        },
    }  # fmt: skip


if __name__ == "__main__":
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"cases": {}}
    inputs = {name: tensor.tolist() for name, tensor in given().items()}
    cases = before["cases"] | (ppo() if sys.argv[1:] == ["ppo"] else losses())
    FILE.write_text(json.dumps({"inputs": inputs, "cases": cases}) + "\n", encoding="utf-8")
