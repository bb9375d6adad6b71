"""Images among tokens: each encoder, the places of patches, who sees whom, with a cache and without one."""

import json
import math
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cleangpt.data.records import Records
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import GatoPatches, LinearPatches, VisionConfig, check_images, patches_of
from cleangpt.models.vit import ViT, pixel_shuffle
from tests.forked import Command, together

LENGTH = 16
SIZE: dict[str, Any] = {"vocab_size": 11, "max_seq_len": LENGTH, "n_layers": 2, "n_heads": 2, "dim": 16}
PICTURE: dict[str, Any] = {"height": 4, "width": 6, "channels": 3, "patch_size": 2}  # 6 tokens
ENCODERS = {
    "linear": VisionConfig(encoder="linear", **PICTURE),
    "gato": VisionConfig(encoder="gato", **PICTURE, dim=8),
    "vit": VisionConfig(encoder="vit", **PICTURE, dim=8, n_heads=2, n_layers=1, projector_dim=12),
    "merged": VisionConfig(encoder="vit", height=8, width=12, patch_size=2, dim=8, n_heads=2, n_layers=1, merge=2),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)
ARCHITECTURES = {
    "gpt": lambda vision: GPTConfig(**SIZE, vision=vision),
    "llama": lambda vision: LlamaConfig(**SIZE, hidden_dim=24, vision=vision),
    "window": lambda vision: LlamaConfig(**SIZE, hidden_dim=24, vision=vision, sliding_window=4, global_every=2),
    "documents": lambda vision: LlamaConfig(**SIZE, hidden_dim=24, vision=vision, separator=3),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def model_of(vision: VisionConfig, architecture: str = "gpt") -> LanguageModel:
    """A model that depends much on what it sees."""
    torch.manual_seed(0)
    model = build_model(ARCHITECTURES[architecture](vision))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def pictures(config: VisionConfig, rows: int, most: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    shape = (rows, most, config.height, config.width, config.channels)
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def tokens_of(rows: int, length: int = LENGTH) -> Tensor:
    return torch.randint(4, 11, (rows, length), generator=torch.Generator().manual_seed(2))


# Places ---------------------------------------------------------------------------------------------------------------
@every_encoder
@torch.no_grad()
def test_patches_replace_the_embeddings_at_their_places(encoder: str) -> None:
    """Against a loop; rows with no image, one, two, and one that the row cuts off at either end."""
    config = ENCODERS[encoder]
    vision = model_of(config).vision
    embeddings, images = torch.randn(5, LENGTH, 16), pictures(config, 5, 2)
    ends = torch.tensor([[0, 0], [7, 0], [6, 14], [3, 0], [19, 0]])
    expected = embeddings.clone()
    for row in range(5):
        for image, end in zip(images[row], ends[row].tolist(), strict=True):
            encoded = vision.encoder((image[None].float() / 255 - 0.5) / 0.5)[0] if end else []
            for number, vector in enumerate(encoded):
                if 0 <= (place := end - 6 + number) < LENGTH:
                    expected[row, place] = vector
    torch.testing.assert_close(vision(embeddings, images, ends), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_ids_at_an_image_do_not_matter() -> None:
    model = model_of(ENCODERS["linear"])
    images, ends, tokens = pictures(ENCODERS["linear"], 1), torch.tensor([[8]]), tokens_of(1)
    other = tokens.clone()
    other[:, 2:8] = 9
    assert model(tokens, images=images, images_ends=ends).equal(model(other, images=images, images_ends=ends))


@pytest.mark.parametrize("absent", ["no argument", "no image in any row", "ends of 0"])
@every_architecture
@torch.no_grad()
def test_without_images_the_model_is_the_one_without_an_encoder(architecture: str, absent: str) -> None:
    config, tokens = ENCODERS["linear"], tokens_of(2)
    model = model_of(config, architecture)
    plain = build_model(ARCHITECTURES[architecture](VisionConfig())).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("vision")})
    none = {"images": pictures(config, 2, 0), "images_ends": torch.zeros(2, 0, dtype=torch.int64)}
    padding = {"images": pictures(config, 2), "images_ends": torch.zeros(2, 1, dtype=torch.int64)}
    images = {"no argument": {}, "no image in any row": none, "ends of 0": padding}
    assert model(tokens, **images[absent]).equal(plain(tokens))


# Who sees whom --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bidirectional", [False, True])
@every_architecture
def test_who_sees_whom(architecture: str, bidirectional: bool) -> None:
    """The gradient of each position's logits is zero at exactly those pixels and tokens that it must not see."""
    config = VisionConfig(encoder="linear", **PICTURE, bidirectional=bidirectional)
    model = model_of(config, architecture)
    window = 4 if architecture == "window" else None
    images = pictures(config, 1, 2)
    ends = torch.tensor([[7, 14]])  # tokens 1 to 6 and 8 to 13
    number = torch.tensor([0, *[1] * 6, 0, *[2] * 6, 0, 0])
    embedded: list[Tensor] = []
    model.vision.register_forward_hook(
        lambda module, inputs, output: embedded.append(output.requires_grad_()) or output
    )
    logits = model(tokens_of(1), images=images, images_ends=ends)
    for query in range(LENGTH):
        (gradient,) = torch.autograd.grad(logits[0, query].square().sum(), embedded[0], retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        for key in range(LENGTH):
            together = bidirectional and number[query] == number[key] > 0
            if key > query and not together and window is None:
                # A later patch is seen through the patches of its image, never by what comes before them.
                through = bidirectional and any(number[other] == number[key] > 0 for other in range(query + 1))
                assert not seen[key] or through
            if window is None and (key <= query or together):
                assert seen[key]


@pytest.mark.parametrize("bidirectional", [False, True])
@every_architecture
@every_encoder
@torch.no_grad()
def test_reading_with_a_cache_gives_the_same_logits(encoder: str, architecture: str, bidirectional: bool) -> None:
    """Prompts of different lengths with no image, one or two of them; then token by token."""
    config = VisionConfig(**{**vars(ENCODERS[encoder]), "bidirectional": bidirectional})
    model, tokens = model_of(config, architecture), tokens_of(3)
    images, ends = pictures(config, 3, 2), torch.tensor([[0, 0], [7, 0], [6, 13]])
    expected = model(tokens, images=images, images_ends=ends)
    cache = model.new_cache(LENGTH)
    lengths = [5, 9, 13]
    first = model(tokens[:, :13], images=images, images_ends=ends, cache=cache)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row, :length], expected[row, :length], atol=1e-4, rtol=1e-4)
    cache.rewind(lengths)
    for step in range(3):
        read = torch.stack([tokens[row, length + step] for row, length in enumerate(lengths)])[:, None]
        logits = model(read, cache=cache)[:, 0]
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row], expected[row, length + step], atol=1e-4, rtol=1e-4)


def test_two_way_images_after_cached_tokens_are_an_error() -> None:
    config = VisionConfig(encoder="linear", **PICTURE, bidirectional=True)
    model = model_of(config)
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens_of(1, 3), cache=cache)
        with pytest.raises(ValueError, match="read with the first tokens"):
            model(tokens_of(1, 8), images=pictures(config, 1), images_ends=torch.tensor([[6]]), cache=cache)


# Encoders -------------------------------------------------------------------------------------------------------------
def test_patches_are_in_raster_order() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)
    found = patches_of(torch.from_numpy(image)[None], 2)[0]
    expected = [image[row : row + 2, column : column + 2] for row in (0, 2) for column in (0, 2, 4)]
    assert (found.numpy() == np.stack(expected)).all()


@torch.no_grad()
def test_linear_patches_are_a_convolution() -> None:
    layer, images = LinearPatches(ENCODERS["linear"], 5), torch.randn(2, 4, 6, 3)
    kernel = layer.linear.weight.view(5, 2, 2, 3).permute(0, 3, 1, 2)
    expected = functional.conv2d(images.permute(0, 3, 1, 2), kernel, layer.linear.bias, stride=2)
    torch.testing.assert_close(layer(images), expected.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_gato_places_patches_by_intervals_of_rows_and_columns() -> None:
    """In evaluation the middle interval of the patch's; in training any of them, as often as any other."""
    layer = GatoPatches(VisionConfig(encoder="gato", height=8, width=4, patch_size=2, dim=8), 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.rows.weight[:, 0] = torch.arange(128.0)
    layer.columns.weight[:, 0] = 1000 * torch.arange(128.0)
    images = torch.zeros(400, 8, 4, 3)
    middles = layer.eval()(images)[0, :, 0]
    assert middles.tolist() == [row + 1000 * column for row in (16, 48, 80, 112) for column in (32, 96)]
    drawn = layer.train()(images)[..., 0].view(400, 4, 2)
    rows = drawn[..., 0] % 1000
    for number in range(4):
        assert (rows[:, number] // 32 == number).all()
        assert len(rows[:, number].unique()) > 25


@torch.no_grad()
def test_gato_divides_pixels_by_the_root_of_the_patch_size() -> None:
    layer = GatoPatches(ENCODERS["gato"], 5).eval()
    seen: list[Tensor] = []
    layer.stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    layer(torch.ones(1, 4, 6, 3))
    assert seen[0].unique().tolist() == pytest.approx([1 / math.sqrt(2)])


def test_pixel_shuffle_gathers_squares() -> None:
    features = torch.arange(24.0).view(1, 24, 1)  # 4 rows of 6
    assert pixel_shuffle(features, (4, 6), 2)[0].tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
    ]  # fmt: skip


@torch.no_grad()
def test_the_vit_is_pytorchs_transformer() -> None:
    torch.manual_seed(0)
    vit = ViT(grid=(2, 3), patch_size=2, channels=3, dim=8, n_layers=2, n_heads=2, hidden_dim=16, merge=1,
              projector_dim=None, out_dim=8, activation="gelu")  # fmt: skip
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    peer = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8, 1e-6), enable_nested_tensor=False).eval()
    for block, other in zip(vit.blocks, peer.layers, strict=True):
        attention = block.attention
        other.self_attn.in_proj_weight.copy_(
            torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        )
        other.self_attn.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]))
        other.self_attn.out_proj.load_state_dict(attention.out.state_dict())
        other.linear1.load_state_dict(block.mlp.up.state_dict())
        other.linear2.load_state_dict(block.mlp.down.state_dict())
    images = torch.randn(2, 4, 6, 3)
    patches = vit.patch_embedding(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.features(images), peer(patches + vit.position_embedding.weight))


# Gradients ------------------------------------------------------------------------------------------------------------
@every_encoder
@pytest.mark.parametrize("given", [True, False])
def test_without_images_every_parameter_of_the_encoder_gets_zeros(encoder: str, given: bool) -> None:
    model, config = model_of(ENCODERS[encoder]).train(), ENCODERS[encoder]
    images = {"images": pictures(config, 2, 0), "images_ends": torch.zeros(2, 0, dtype=torch.int64)} if given else {}
    model(tokens_of(2), **images).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert name.startswith("vision") == (not parameter.grad.any()), name


def _steps(encoder: str) -> None:
    """The gradients of a step in which the first process has an image and the second text alone; then neither has."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    config, rank = ENCODERS[encoder], dist.get_rank()
    model = DistributedDataParallel(model_of(config).train())
    sums = []
    for images in (rank == 0, False):
        inputs = {"images": pictures(config, 2), "images_ends": torch.tensor([[6], [8]])} if images else {}
        model.zero_grad()
        model(tokens_of(2), **inputs).square().mean().backward()
        sums.append([float(parameter.grad.sum()) for parameter in model.parameters() if parameter.grad is not None])
    Path(f"{rank}.json").write_text(json.dumps(sums))
    dist.destroy_process_group()


@pytest.mark.slow
@every_encoder
def test_ddp_does_not_wait_for_a_process_that_has_text_alone(encoder: str, tmp_path: Path) -> None:
    commands = [Command(partial(_steps, encoder), environment=ours, folder=tmp_path) for ours in together(2)]
    assert [command.wait() for command in commands] == [0, 0], commands[0].stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len(first[0]) == len(list(model_of(ENCODERS[encoder]).parameters()))


# What is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 33}, r"model.vision.height is 33; allowed: a multiple of 16"),
        ({"width": 32, "encoder": "vit", "merge": 4}, r"model.vision.height is 64|model.vision.width is 32"),
        ({"encoder": "vit", "n_heads": 5}, r"model.vision.n_heads is 5; allowed: a divisor of dim, which is 64"),
        ({"encoder": "cnn"}, r"model.vision.encoder is 'cnn'; allowed: linear, gato, vit or None"),
        ({"channels": 5}, r"model.vision.channels is 5"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VisionConfig(**{"encoder": "linear"} | fields)


def test_images_of_another_size_are_refused() -> None:
    config = GPTConfig(**SIZE, vision=ENCODERS["linear"])
    check_images(config, {"images": ENCODERS["linear"].records})
    check_images(config, {})
    with pytest.raises(
        UserError, match=r"reads images \(4, 6, 3\) at 6 tokens; the corpus has images \(8, 8, 1\), uint8"
    ):
        check_images(config, {"images": Records(dtype="uint8", shape=(8, 8, 1), tokens=16)})
