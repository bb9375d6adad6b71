"""Images: each encoder in front of a model, against the CPU in fp64."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.correct import sizes
from benchmarks.gpu.policies import compare
from benchmarks.gpu.setup import Measurement, Setup
from cleangpt.data.batch import Batch
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.objectives import NextToken


def images(setup: Setup) -> Iterator[Measurement]:
    """Loss and gradient of a model with each encoder, on rows with two images, one and none, in fp32 and bf16."""
    for name, vision in encoders(setup).items():
        torch.manual_seed(0)
        model = build_model(GPTConfig(**sizes(setup), vision=vision)).eval()  # in training, Gato's places are drawn
        batch = captioned(vision, model.config.vocab_size or 0, model.max_seq_len)
        yield from compare(setup, name, model, NextToken(), batch)


def encoders(setup: Setup) -> dict[str, VisionConfig]:
    """Every kind of encoder; at full size an image stands at 16 tokens, at toy size at 4."""
    shape: dict[str, Any] = setup.size({"height": 64, "width": 64}, {"height": 16, "width": 16, "patch_size": 8})
    width: dict[str, Any] = setup.size({"dim": 192, "n_heads": 3}, {"dim": 16, "n_heads": 2})
    merged = shape | {"patch_size": setup.size(8, 4)}
    return {
        "linear": VisionConfig(encoder="linear", **shape),
        "gato": VisionConfig(encoder="gato", **shape, dim=setup.size(96, 32)),
        "vit": VisionConfig(encoder="vit", **merged, **width, merge=2, projector_dim=setup.size(512, 32)),
        "vit, attending in both directions": VisionConfig(
            encoder="vit", **merged, **width, merge=2, bidirectional=True
        ),
    }


def captioned(vision: VisionConfig, vocab_size: int, seq_len: int) -> Batch:
    """Rows of random tokens with two images, one, and none."""
    tokens = torch.randint(vocab_size, (3, seq_len + 1))
    pictures = torch.randint(0, 256, (3, 2, vision.height, vision.width, vision.channels), dtype=torch.uint8)
    first, second = vision.tokens + 2, 2 * vision.tokens + 5
    ends = torch.tensor([[first, second], [first, 0], [0, 0]])
    inputs = {"tokens": tokens[:, :-1].contiguous(), "images": pictures, "images_ends": ends}
    return Batch(inputs, tokens[:, 1:].contiguous())
