"""Random batches of answers, and a model whose scores are given, for tests of policy objectives."""

from typing import Any

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.head import TokenScores

F64 = torch.float64


class Given:
    """Stands in for a model: its log-probabilities, entropies and values are leaves that collect gradients."""

    def __init__(self, logprobs: Tensor, entropy: Tensor | None = None, value: Tensor | None = None) -> None:
        self.logprobs, self.entropy, self.value = logprobs, entropy, value

    def __call__(self, tokens: Tensor, *, targets: Tensor, scores: list[str]) -> TokenScores:
        heads = {"value": self.value} if self.value is not None else {}
        masked = torch.where(targets != IGNORED, self.logprobs, 0.0)
        entropy = torch.where(targets != IGNORED, self.entropy, 0.0) if self.entropy is not None else None
        return TokenScores(masked, entropy=entropy, heads=heads)


def random_batch(rows: int = 6, seq: int = 7, seed: int = 0, prompt: int = 2) -> tuple[Batch, dict[str, Tensor]]:
    """A batch of answers of different lengths after prompts of `prompt` tokens, float64, and the model's scores."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, seq, generator=generator, dtype=F64)

    lengths = torch.arange(rows) % (seq - prompt) + 1
    places = torch.arange(seq)
    mask = (places >= prompt) & (places < prompt + lengths[:, None])
    old = -normal().abs() - 0.1
    extras = {
        "old_logprobs": torch.where(mask, old, 0.0),
        "reference_logprobs": torch.where(mask, old + normal(0.3), 0.0),
        "advantages": torch.where(mask, normal()[:, :1], 0.0),
        "returns": normal(),
        "old_values": normal(),
        "fresh": torch.zeros(rows, dtype=F64),
    }
    targets = torch.where(mask, 1, IGNORED)
    scores = {"logprobs": old + normal(0.3), "entropy": normal().abs(), "value": normal()}
    return Batch({"tokens": torch.ones(rows, seq, dtype=torch.int64)}, targets, extras), scores


def loss_and_gradients(objective: Any, batch: Batch, scores: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of a batch, and its gradients with respect to the model's scores."""
    leaves = {name: score.clone().requires_grad_() for name, score in scores.items()}
    loss = objective(Given(**leaves), batch)
    mean = loss.total / max(objective.count(batch), 1)
    mean.backward()
    gradients = {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return float(mean.detach()), gradients
