"""Batches of answers with given log-probabilities, for tests of objectives on preferences."""

from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.head import TokenScores


class Given(nn.Module):
    """A model whose log-probabilities, and outputs of heads, are its parameters `(rows, seq)`.

    A row of a batch is known by its first token.
    """

    def __init__(self, logprobs: Tensor, reward: Tensor | None = None) -> None:
        super().__init__()
        self.logprobs = nn.Parameter(logprobs)
        self.reward = nn.Parameter(torch.zeros_like(logprobs) if reward is None else reward)

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None, **options: Any) -> TokenScores:
        rows = tokens[:, 0]
        logprobs = self.logprobs[rows] if targets is None else self.logprobs[rows].where(targets != IGNORED, 0.0)
        return TokenScores(logprobs, heads={"reward": self.reward[rows]})


def answers(lengths: list[int], prompt: int = 3, padding: int = 2, **extras: Tensor) -> Batch:
    """Rows of a prompt, an answer of the given length and padding; row n consists of tokens n."""
    seq = prompt + max(lengths) + padding
    tokens = torch.arange(len(lengths))[:, None].expand(-1, seq).contiguous()
    targets = torch.full((len(lengths), seq), IGNORED)
    for row, length in enumerate(lengths):
        targets[row, prompt : prompt + length] = 1
    return Batch({"tokens": tokens}, targets, extras, group=2)
