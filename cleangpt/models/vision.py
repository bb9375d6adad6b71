"""Images in a model's input: an encoder turns each into embeddings, which replace those of the tokens it stands at.

Three encoders, chosen by `VisionConfig.encoder`:

linear  a linear layer on the pixels of each patch (Bavishi et al. 2023, "Fuyu-8B")
gato    a ResNet block on each patch, and embeddings of its row and column (Reed et al. 2022, "A generalist agent",
        appendix C)
vit     a vision transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words") and a projector (Liu et al.
        2024, "Improved baselines with visual instruction tuning"); see `models/vit.py`

The encoder runs even where a batch has no image, on none, so that its parameters get zeros as gradients on every
process.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.config import Layers, ModelConfig, Width
from cleangpt.data.images import IMAGES
from cleangpt.data.pictures import PictureForm, Resample, Resize
from cleangpt.data.records import ENDS, Records
from cleangpt.errors import UserError
from cleangpt.models.cache import KVCache
from cleangpt.models.vit import ViT
from cleangpt.validation import Bounds, Checked, Positive

INTERVALS = 128
"""Intervals that rows and columns of patches are divided into, as in Gato."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Checked, section="model.vision"):
    """How a model reads images; without an encoder, it reads none."""

    encoder: Literal["linear", "gato", "vit"] | None = None
    """linear: a linear layer on each patch; gato: a ResNet block on each patch; vit: a vision transformer; None: the
    model reads no images."""
    height: Width = 64
    """Of an image in pixels; images are resized to it when a dataset is prepared."""
    width: Width = 64
    """Of an image in pixels."""
    channels: Annotated[int, Bounds(1, 4)] = 3
    """1: grey; 3: red, green and blue."""
    patch_size: Width = 16
    """Height and width of a patch in pixels; a divisor of both."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from the pixels, which are 0 to 1: a number for each channel, or one for all."""
    std: tuple[Positive, ...] = (0.5,)
    """Divides the pixels after that."""
    resize: Resize = "stretch"
    """How a picture gets that size: stretch: each side to its own; crop: the shorter side, then the middle is cut out;
    as corpus.resize."""
    resample: Resample = "bicubic"
    """Interpolation of Pillow; as corpus.resample."""
    longest_edge: Annotated[int, Bounds(0, 4096)] = 0
    """For prompts: pictures first get this longer side, in pixels, and stand between special tokens, as in Idefics3; 0:
    neither. Pictures of a dataset are not prepared so."""
    tiles: bool = False
    """For prompts: pictures of that longer side are cut into tiles of height x width, which come before the whole."""
    bidirectional: bool = False
    """Whether the patches of an image attend to one another in both directions, as in PaliGemma; text is causal."""
    dim: Width = 64
    """gato: channels of the ResNet block; vit: width of the transformer."""
    n_layers: Layers = 2
    """vit: blocks."""
    n_heads: Width = 4
    """vit: attention heads; a divisor of dim."""
    hidden_dim: Width | None = None
    """vit: hidden width of the MLPs; None: 4 x dim."""
    activation: Literal["gelu_tanh", "gelu", "quick_gelu"] = "gelu_tanh"
    """vit: activation function of the MLPs: gelu_tanh in SigLIP, quick_gelu in CLIP."""
    norm_eps: Positive = 1e-6
    """vit: epsilon of LayerNorm."""
    class_token: bool = False
    """vit: a token before the patches, a norm before the first block and no bias of the patches, as in CLIP."""
    final_norm: bool = True
    """vit: a norm after the last block; LLaVA has none."""
    merge: Width = 1
    """vit: merge squares of merge x merge patches into one token (pixel shuffle, as in Idefics3)."""
    projector_dim: Width | None = None
    """vit: hidden width of the projector, an MLP; None: the projector is one linear layer."""
    projector_bias: bool = True
    """vit: biases in the projector; Idefics3 has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = self.patch_size * (self.merge if self.encoder == "vit" else 1)
        for name in ("height", "width"):
            if self.encoder is not None and getattr(self, name) % unit:
                raise UserError(f"model.vision.{name} is {getattr(self, name)}; allowed: a multiple of {unit}")
        if self.encoder == "vit" and self.dim % self.n_heads:
            raise UserError(f"model.vision.n_heads is {self.n_heads}; allowed: a divisor of dim, which is {self.dim}")
        if self.tiles and not self.longest_edge:
            raise UserError("model.vision.tiles is True; allowed with longest_edge 0: False")
        for name in ("mean", "std"):
            if len(values := getattr(self, name)) not in (1, self.channels):
                raise UserError(
                    f"model.vision.{name} is {values}; allowed: a number, or one for each of {self.channels} channels"
                )

    @property
    def form(self) -> PictureForm:
        """What a picture becomes for the model."""
        return PictureForm(self.height, self.width, self.channels, self.resize, self.resample)

    def normalized(self, images: Tensor) -> Tensor:
        """Images `(..., height, width, channels)`, uint8, as the encoder reads them, float32."""
        mean, std = images.new_tensor(self.mean, dtype=torch.float32), images.new_tensor(self.std, dtype=torch.float32)
        return (images.float() / 255 - mean) / std

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that an image stands at."""
        merged = self.merge**2 if self.encoder == "vit" else 1
        return math.prod(self.grid) // merged

    @property
    def hidden_size(self) -> int:
        """vit: hidden width of the MLPs."""
        return self.hidden_dim or 4 * self.dim

    @property
    def records(self) -> Records:
        """The records that the model reads."""
        return Records(dtype="uint8", shape=(self.height, self.width, self.channels), tokens=self.tokens)


def vision_of(config: ModelConfig) -> VisionConfig:
    """How a model of this configuration reads images; architectures without a field `vision` do not."""
    found: VisionConfig = vars(config).get("vision", VisionConfig())
    return found


def image_inputs(config: ModelConfig) -> frozenset[str]:
    """Keywords of `features` for images, if the model reads any; a batch may lack them."""
    return frozenset() if vision_of(config).encoder is None else frozenset({IMAGES, IMAGES + ENDS})


def check_images(config: ModelConfig, records: Mapping[str, Records]) -> None:
    """Checks that a model reads images of the size that a dataset has.

    Raises:
        UserError: the sizes, or the numbers of tokens, differ.
    """
    vision = vision_of(config)
    if IMAGES not in records or vision.encoder is None or records[IMAGES] == vision.records:
        return
    there, read = records[IMAGES], vision.records
    raise UserError(
        f"model.vision reads images {read.shape} at {read.tokens} tokens; the corpus has images {there.shape}, "
        f"{there.dtype}, at {there.tokens}"
    )


def check_preparation(config: ModelConfig, corpus: Mapping[str, Any]) -> None:
    """Checks that a corpus prepares its pictures as the model does, if it has fields for that.

    Raises:
        UserError: one of them differs.
    """
    for name in ("resize", "resample"):
        own = getattr(vision_of(config), name)
        if (there := corpus.get(name, own)) != own:
            raise UserError(f"corpus.{name} is {there!r}; allowed: model.vision.{name}, which is {own!r}")


# Encoders -------------------------------------------------------------------------------------------------------------
def patches_of(images: Tensor, size: int) -> Tensor:
    """Images `(n, height, width, channels)` as patches `(n, rows * columns, size, size, channels)` in raster order."""
    count, height, width, channels = images.shape
    rows, columns = height // size, width // size
    grid = images.reshape(count, rows, size, columns, size, channels)
    return grid.transpose(2, 3).reshape(count, rows * columns, size, size, channels)


class LinearPatches(nn.Module):
    """A linear layer on the pixels of each patch."""

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.linear = nn.Linear(config.patch_size**2 * config.channels, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images `(n, height, width, channels)` to `(n, tokens, dim)`."""
        return self.linear(patches_of(images, self.patch_size).flatten(2))  # type: ignore[no-any-return]


class GatoPatches(nn.Module):
    """A ResNet block (He et al. 2016, "Identity mappings in deep residual networks") with GroupNorm and GELU on each
    patch, and embeddings of the patch's row and column.

    Rows and columns are divided into 128 intervals, of which a patch covers several: in training one of them is drawn,
    in evaluation it is the middle one.
    """

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.patch_size, self.grid = config.patch_size, config.grid
        groups = math.gcd(32, config.dim)
        self.stem = nn.Conv2d(config.channels, config.dim, 3, padding=1)
        self.first_norm = nn.GroupNorm(groups, config.dim)
        self.first = nn.Conv2d(config.dim, config.dim, 3, padding=1)
        self.second_norm = nn.GroupNorm(groups, config.dim)
        self.second = nn.Conv2d(config.dim, config.dim, 3, padding=1)
        self.linear = nn.Linear(config.dim * config.patch_size**2, dim)
        self.rows, self.columns = nn.Embedding(INTERVALS, dim), nn.Embedding(INTERVALS, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(n, height, width, channels)` from -1 to 1 to `(n, tokens, dim)`."""
        patches = patches_of(images, self.patch_size) / math.sqrt(self.patch_size)
        x = self.stem(patches.flatten(0, 1).permute(0, 3, 1, 2))
        x = x + self.second(F.gelu(self.second_norm(self.first(F.gelu(self.first_norm(x))))))
        embedded = self.linear(x.flatten(1)).unflatten(0, (-1, math.prod(self.grid)))
        rows, columns = (self._intervals(size, len(images), images.device) for size in self.grid)
        positions = self.rows(rows)[:, :, None] + self.columns(columns)[:, None, :]
        return embedded + positions.flatten(1, 2)  # type: ignore[no-any-return]

    def _intervals(self, size: int, count: int, device: torch.device) -> Tensor:
        """The interval `(count, size)` of each of `size` rows or columns of an image."""
        first = torch.arange(size, device=device) * INTERVALS // size
        last = ((torch.arange(size, device=device) + 1) * INTERVALS // size - 1).maximum(first)
        if not self.training:
            return ((first + last) / 2).round().long().expand(count, -1)
        draws = torch.rand(count, size, device=device)
        return first + (draws * (last - first + 1)).long()


def build_encoder(config: VisionConfig, dim: int) -> nn.Module:
    """The encoder of images: `(n, height, width, channels)` to `(n, tokens, dim)`."""
    if config.encoder == "vit":
        return ViT(
            grid=config.grid, patch_size=config.patch_size, channels=config.channels, dim=config.dim,
            n_layers=config.n_layers, n_heads=config.n_heads, hidden_dim=config.hidden_size,
            merge=config.merge, projector_dim=config.projector_dim, out_dim=dim, activation=config.activation,
            norm_eps=config.norm_eps, class_token=config.class_token, final_norm=config.final_norm,
            projector_bias=config.projector_bias,
        )  # fmt: skip
    return LinearPatches(config, dim) if config.encoder == "linear" else GatoPatches(config, dim)


# Images among tokens --------------------------------------------------------------------------------------------------
class Vision(nn.Module):
    """Images to embeddings, and these to their places among the tokens."""

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config, dim)

    def forward(self, embeddings: Tensor, images: Tensor | None, ends: Tensor | None) -> Tensor:
        """Embeddings of tokens, with those at images replaced by the images' own.

        Args:
            embeddings: `(batch, seq, dim)`.
            images: `(batch, most, height, width, channels)`, uint8; None: there are none.
            ends: where each image ends `(batch, most)`, int64, in tokens from the start of the row; tokens of an image
                outside of the row are left out, so that with 0 there is no image.

        Returns:
            `(batch, seq, dim)`.
        """
        config, (batch, seq, _) = self.config, embeddings.shape
        if images is None or ends is None:
            if not torch.is_grad_enabled():
                return embeddings
            images = torch.zeros(batch, 0, config.height, config.width, config.channels, device=embeddings.device)
            ends = torch.zeros(batch, 0, dtype=torch.int64, device=embeddings.device)
        places = self._places(ends)
        inside = (places >= 0) & (places < seq)
        shown = inside.any(-1)
        encoded = self.encoder(config.normalized(images[shown]).to(embeddings.dtype)).to(embeddings.dtype)
        kept = inside[shown]
        rows = shown.nonzero()[:, :1].expand_as(kept)
        return embeddings.index_put((rows[kept], places[shown][kept]), encoded[kept])

    def open_masks(self, masks: dict[Any, Any], ends: Tensor | None, tokens: Tensor, cache: KVCache | None) -> None:
        """Lets the patches of each image attend to one another, if the configuration says so.

        Args:
            masks: what each token attends to, by the block's window; changed in place.
            ends: as for `forward`.
            tokens: being read `(batch, seq)`.
            cache: of earlier tokens, among which there must be none.

        Raises:
            ValueError: an image comes after tokens that are in the cache.
        """
        batch, seq = tokens.shape
        if not self.config.bidirectional or ends is None or not ends.shape[1]:
            return
        if cache is not None and cache.end != seq:
            raise ValueError("images that attend in both directions are read with the first tokens, not after others")
        numbers = self._numbers(ends, batch, seq)
        together = ((numbers[:, :, None] == numbers[:, None, :]) & (numbers > 0)[:, None, :])[:, None]
        causal = torch.ones(seq, seq, dtype=torch.bool, device=ends.device).tril()
        for window, mask in masks.items():
            masks[window] = together | (causal if mask is None else _dense(mask, batch, seq, ends.device))

    def _places(self, ends: Tensor) -> Tensor:
        """The places `(batch, most, tokens)` of the tokens of each image."""
        steps = torch.arange(-self.config.tokens, 0, device=ends.device)
        return ends[..., None] + steps

    def _numbers(self, ends: Tensor, batch: int, seq: int) -> Tensor:
        """The number of the image at each token `(batch, seq)`, from 1; 0: none."""
        places = self._places(ends)
        inside = (places >= 0) & (places < seq)
        rows, images, _ = inside.nonzero(as_tuple=True)
        numbers = torch.zeros(batch, seq, dtype=torch.int64, device=ends.device)
        return numbers.index_put((rows, places[inside]), images + 1)


def _dense(mask: Any, batch: int, seq: int, device: torch.device) -> Tensor:
    """A mask as a tensor, also where it is FlexAttention's blocks."""
    if isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, batch, 1, seq, seq, device=str(device))


def build_vision(config: VisionConfig, dim: int) -> Vision | None:
    """What reads a model's images; None: it reads none."""
    return None if config.encoder is None else Vision(config, dim)
