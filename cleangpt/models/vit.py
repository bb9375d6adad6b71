"""A vision transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words") and its projector.

Pre-LayerNorm blocks with learned positions, as in SigLIP (Zhai et al. 2023, "Sigmoid loss for language image
pre-training"); with a class token, as in CLIP (Radford et al. 2021, "Learning transferable visual models from natural
language supervision"). Both are exact to their released weights. The projector turns the features into embeddings of a
language model: a linear layer or an MLP, after neighbouring patches have been merged (pixel shuffle, Laurençon et al.
2024, "Building and better understanding vision-language models", section 2.2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.models.layers import MLP


class VitAttention(nn.Module):
    """Multi-head self-attention of every patch to every patch."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(images, patches, dim)` to the same shape."""
        heads = (self.n_heads, -1)
        query, key, value = (
            layer(x).unflatten(-1, heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class VitBlock(nn.Module):
    """Attention and MLP, each with a norm before it, added to the residual stream."""

    def __init__(self, dim: int, n_heads: int, hidden_dim: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, norm_eps)
        self.attention = VitAttention(dim, n_heads)
        self.mlp_norm = nn.LayerNorm(dim, norm_eps)
        self.mlp = MLP(dim, hidden_dim, gated=False, activation=activation, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(images, patches, dim)` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Projector(nn.Module):
    """Features of a square of patches to one embedding of the language model."""

    def __init__(self, dim: int, merge: int, hidden_dim: int | None, out_dim: int, bias: bool = True) -> None:
        super().__init__()
        merged = dim * merge**2
        self.merge = merge
        self.up = None if hidden_dim is None else nn.Linear(merged, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim or merged, out_dim, bias=bias)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(images, patches, dim)` of a grid of patches to `(images, patches / merge², out_dim)`."""
        merged = pixel_shuffle(features, grid, self.merge)
        return self.down(merged if self.up is None else F.gelu(self.up(merged)))  # type: ignore[no-any-return]


def pixel_shuffle(features: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """Concatenates the features of each square of `merge` x `merge` patches, row by row.

    Args:
        features: `(images, rows * columns, dim)`.
        grid: rows and columns.
        merge: side of a square.

    Returns:
        `(images, rows * columns / merge², dim * merge²)`.
    """
    rows, columns = (size // merge for size in grid)
    squares = features.view(len(features), rows, merge, columns, merge, features.shape[-1])
    return squares.transpose(2, 3).reshape(len(features), rows * columns, merge**2 * features.shape[-1])


class ViT(nn.Module):
    """A vision transformer and its projector."""

    def __init__(
        self, *, grid: tuple[int, int], patch_size: int, channels: int, dim: int, n_layers: int, n_heads: int,
        hidden_dim: int, merge: int, projector_dim: int | None, out_dim: int, activation: str = "gelu_tanh",
        norm_eps: float = 1e-6, class_token: bool = False, final_norm: bool = True, projector_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        self.patch_embedding = nn.Conv2d(channels, dim, patch_size, stride=patch_size, bias=not class_token)
        self.class_embedding = nn.Parameter(torch.zeros(dim)) if class_token else None
        self.position_embedding = nn.Embedding(math.prod(grid) + class_token, dim)
        self.input_norm = nn.LayerNorm(dim, norm_eps) if class_token else nn.Identity()
        self.blocks = nn.ModuleList(VitBlock(dim, n_heads, hidden_dim, activation, norm_eps) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(dim, norm_eps) if final_norm else nn.Identity()
        self.projector = Projector(dim, merge, projector_dim, out_dim, projector_bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images `(n, height, width, channels)` to `(n, tokens, out_dim)`."""
        return self.projector(self.features(images), self.grid)  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """Normalized images `(n, height, width, channels)` to features of their patches `(n, patches, dim)`."""
        x = self.patch_embedding(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.input_norm(x + self.position_embedding(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x[:, -math.prod(self.grid) :])  # type: ignore[no-any-return]
