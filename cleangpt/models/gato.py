"""Gato (Reed et al. 2022, "A generalist agent"): one decoder for text, observations and actions.

A Llama that also reads vectors, and embeds the place of a token in its observation. In the paper numbers begin as
unrelated tokens; here bins may begin as points of a smooth curve instead, so that what is learned of one holds for its
neighbours.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from cleangpt.config import Width
from cleangpt.data.timesteps import HIDDEN, NO_PLACE
from cleangpt.errors import UserError
from cleangpt.models.cache import KVCache
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.models.vectors import Vectors
from cleangpt.validation import Bounds

WAVES = 32
"""Cosines that a curve of bins is made of."""
OUTSIDE = -1e4
"""The logit of an id that is not scored; its probability is 0 in any precision."""


@dataclass(frozen=True, kw_only=True)
class GatoConfig(LlamaConfig):
    """The paper's 79M has n_layers 8, n_heads 24, dim 768, hidden_dim 3072, head_dim 32, vocab_size 33,024."""

    n_places: Width = 512
    """Embedded places; tokens further on in an observation share the last one."""
    smooth_bins: tuple[Annotated[int, Bounds(0)], Annotated[int, Bounds(2)]] | None = None
    """The first of the ids that stand for numbers and the one after the last, whose embeddings begin on a smooth curve;
    None: like any others."""

    vector: Annotated[int, Bounds(0, 2**16)] = 0
    """Numbers in the vectors that the model reads, the corpus's modalities.vector; 0: it reads none."""

    def check_fit(self) -> None:
        """Checks that the fields fit together.

        Raises:
            UserError: one line naming the field, its value and what is allowed.
        """
        super().check_fit()
        if self.smooth_bins is None:
            return
        first, end = self.smooth_bins
        if not first < end <= (self.vocab_size or end):
            allowed = f"at most model.vocab_size, which is {self.vocab_size}" if self.vocab_size else "of bins"
            raise UserError(f"model.smooth_bins is {self.smooth_bins}; allowed: a range of ids, {allowed}")


class Gato(Llama):
    """Token ids and their places to logits."""

    inputs: ClassVar[frozenset[str]] = frozenset({"places"})
    tensor_plan: ClassVar[dict[str, str]] = {}
    scored_ids: tuple[int, int] | None = None
    """The first of the ids that scores are over and the one after the last, those of actions; None: all."""
    config: GatoConfig

    def __init__(self, config: GatoConfig) -> None:
        super().__init__(config)
        self.place_embedding = nn.Embedding(config.n_places, config.dim)
        self.vectors = Vectors(config.vector, config.dim) if config.vector else None
        for name, parameter in self.named_parameters():
            if name.startswith(("place_embedding.", "vectors.")):
                self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """As any model's, but for the embeddings of bins, if they begin on a curve, and for the first layer that
        vectors go through, whose outputs begin about as large as its inputs."""
        super().init_parameter(name, parameter)
        if name == "vectors.first.weight":
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name == "token_embedding.weight" and self.config.smooth_bins is not None:
            first, end = self.config.smooth_bins
            with torch.no_grad():
                parameter[first:end] = curve(end - first, parameter.shape[1], 0.02).to(parameter)

    def flops_per_token(self, seq_len: int) -> int:
        """As Llama's; embeddings of places are looked up, not multiplied."""
        return super().flops_per_token(seq_len) - 6 * self.place_embedding.weight.numel()

    def _scored_logits(self, features: Tensor) -> Tensor:
        logits = super()._scored_logits(features)
        if self.scored_ids is None:
            return logits
        ids = torch.arange(logits.shape[-1], device=logits.device)
        # Not infinite, since 0 times infinity would be in the entropy.
        return logits.masked_fill((ids < self.scored_ids[0]) | (ids >= self.scored_ids[1]), OUTSIDE)

    def _embed(  # type: ignore[override]
        self, tokens: Tensor, cache: KVCache | None, places: Tensor | None = None, vectors: Tensor | None = None,
        vectors_ends: Tensor | None = None, **images: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The embeddings of visible tokens, images and vectors, plus those of all places; without `places` that of no
        place, as text has beside observations in a batch."""
        x = super()._embed(tokens, cache, **images)
        if self.vectors is not None:
            x = self.vectors(x, vectors, vectors_ends)
        if places is None:
            places = torch.full_like(tokens, NO_PLACE)
        visible = (places != HIDDEN)[..., None]
        embedded: Tensor = x * visible + self.place_embedding(places.clamp(max=self.config.n_places - 1))
        return embedded


def curve(points: int, dim: int, std: float) -> Tensor:
    """Points `(points, dim)` on a random smooth curve, with this standard deviation: sums of cosines, slow ones louder.

    Drawn from PyTorch's generator on the CPU.
    """
    at = (torch.arange(points) + 0.5) / points
    waves = torch.arange(1, min(WAVES, points) + 1)
    louder = waves.float() ** -0.75
    cosines = torch.cos(math.pi * at[:, None] * waves) * louder / louder.square().sum().sqrt() * math.sqrt(2)
    return cosines @ torch.randn(len(waves), dim) * std
