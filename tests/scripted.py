"""A language model without weights, for tests that need to know its logits."""

from typing import Any

import torch
from torch import Tensor

from cleangpt.config import ModelConfig
from cleangpt.models.base import LanguageModel


class Scripted(LanguageModel):
    """Its features are its logits: a subclass says in `logits` what each position predicts; it has no cache."""

    def __init__(self, vocab_size: int, max_seq_len: int = 64) -> None:
        super().__init__(ModelConfig(vocab_size=vocab_size, max_seq_len=max_seq_len))

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens `(batch, seq)` to logits `(batch, seq, vocab)`."""
        raise NotImplementedError

    def features(self, tokens: Tensor, **_: Any) -> Tensor:
        return self.logits(tokens)

    def to_logits(self, features: Tensor) -> Tensor:
        return features

    def head_parameters(self) -> list[Tensor]:
        return []


class Bigrams(Scripted):
    """Logits that depend on the last token alone, by a random table."""

    def __init__(self, seed: int) -> None:
        super().__init__(4, max_seq_len=16)
        self.table = 1.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]
