"""Greedy tokens of whole batches, for tests that compare models by what they write."""

import torch
from torch import Tensor

from cleangpt.inference.engine import Engine
from cleangpt.models.base import LanguageModel


def greedy(model: LanguageModel, prompts: Tensor, count: int, cached: bool = True) -> Tensor:
    """The `count` most likely tokens `(batch, count)`, one after another, after `prompts` `(batch, seq)`."""
    completions = Engine(model, prompts.device, cached=cached).generate(prompts.tolist(), max_new_tokens=count)
    return torch.tensor([[token.id for token in completion.tokens] for completion in completions])
