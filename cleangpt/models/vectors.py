"""Vectors of an observation's numbers in a model's input: an MLP turns each into the embedding of its token."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import ModelConfig
from cleangpt.data.records import ENDS, Records
from cleangpt.data.timesteps import VECTORS
from cleangpt.errors import UserError


class Vectors(nn.Module):
    """Two linear layers and GELU between them, of vectors with `size` numbers from -1 to 1."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.first, self.second = nn.Linear(size, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, embeddings: Tensor, vectors: Tensor | None, ends: Tensor | None) -> Tensor:
        """Embeddings of tokens, with those at vectors replaced by the vectors' own.

        Runs even where there are no vectors, on none, so that its parameters get zeros as gradients on every process.

        Args:
            embeddings: `(batch, seq, dim)`.
            vectors: `(batch, most, size)`, float32; None: there are none.
            ends: the number of tokens up to and including that of each vector `(batch, most)`, int64; one outside of
                the row is left out, so that 0 is no vector.

        Returns:
            `(batch, seq, dim)`.
        """
        batch, seq, _ = embeddings.shape
        if vectors is None or ends is None:
            vectors = embeddings.new_zeros(batch, 0, self.size)
            ends = torch.zeros(batch, 0, dtype=torch.int64, device=embeddings.device)
        inside = (ends > 0) & (ends <= seq)
        encoded = self.second(F.gelu(self.first(vectors[inside]))).to(embeddings.dtype)
        return embeddings.index_put((inside.nonzero()[:, 0], ends[inside] - 1), encoded)


def vector_size(config: ModelConfig) -> int:
    """Numbers in the vectors that a model reads; 0: it reads none, as architectures without a field `vector`."""
    found: int = vars(config).get("vector", 0)
    return found


def vector_inputs(config: ModelConfig) -> frozenset[str]:
    """Keywords of `features` for vectors, if the model reads any; a batch may lack them."""
    return frozenset({VECTORS, VECTORS + ENDS}) if vector_size(config) else frozenset()


def check_vectors(config: ModelConfig, records: Mapping[str, Records]) -> None:
    """Checks that a model reads vectors of the size that a dataset has.

    Raises:
        UserError: the sizes differ.
    """
    if VECTORS in records and vector_size(config) not in (0, records[VECTORS].shape[0]):
        raise UserError(
            f"model.vector is {vector_size(config)}; allowed: {records[VECTORS].shape[0]}, corpus.modalities.vector"
        )
