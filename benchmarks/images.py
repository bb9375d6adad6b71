"""Images: the vision transformer, what an encoder costs a batch of text, and the loading of images; in CPU time.

The peer of the vision transformer is Transformers' `SiglipVisionModel` of the same weights, without its pooling head:
forward and backward on the same images. A model with an encoder and one without read the same text. A batch of images
is loaded from the dataset of `shapes_captions`, whose step of training is the limit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.loader import WAIT_GOAL, batch_loader
from benchmarks.made import close, make_trainer, shipped, train_macro_batch
from benchmarks.runner import Row, Setup, cpu_seconds, interleave, one_thread
from cleangpt.corpora import prepare
from cleangpt.data.mixing import MixedDataset
from cleangpt.models import build_model
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.models.vit import ViT

TEXT_GOAL = 1.02
SIDE, PATCH, DIM, LAYERS, HEADS = 96, 8, 128, 4, 4
PATCHES = (SIDE // PATCH) ** 2


def run(setup: Setup) -> list[Row]:
    """The rows of the benchmark."""
    with one_thread():
        return [encoder_row(setup), text_row(setup), loader_row(setup)]


def encoder_row(setup: Setup) -> Row:
    """1,000 patches through either vision transformer, forward and backward."""
    images = torch.randn(2 if setup.quick else 32, SIDE, SIDE, 3)
    pixels, ours, theirs = images.permute(0, 3, 1, 2).contiguous(), our_vit(), their_vit()
    measures = {
        "ours": lambda: _per_thousand(len(images), lambda: ours.features(images)),
        "SiglipVisionModel": lambda: _per_thousand(len(images), lambda: theirs(pixels).last_hidden_state),
    }
    taken = interleave(measures, setup.repetitions)
    what = f"vision transformer, {LAYERS} × {DIM}: 1,000 patches"
    return Row(what, "s", taken["ours"], "SiglipVisionModel", taken["SiglipVisionModel"])


def our_vit() -> ViT:
    """The encoder of `model.vision`."""
    return ViT(
        grid=(SIDE // PATCH, SIDE // PATCH), patch_size=PATCH, channels=3, dim=DIM, n_layers=LAYERS, n_heads=HEADS,
        hidden_dim=4 * DIM, merge=1, projector_dim=None, out_dim=DIM,
    )  # fmt: skip


def their_vit() -> nn.Module:
    """The same of Transformers."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=DIM, intermediate_size=4 * DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    model: nn.Module = SiglipVisionModel(config)
    return model


def _per_thousand(images: int, features: Callable[[], Tensor]) -> float:
    """CPU seconds for 1,000 patches of this many images."""
    return cpu_seconds(lambda: features().sum().backward()) / images / PATCHES * 1000  # type: ignore[no-untyped-call]


def text_row(setup: Setup) -> Row:
    """A batch of text, forward and backward, in a model with an encoder and in the same without."""
    rows, repeats = (2, 1) if setup.quick else (16, 5)
    tokens = torch.randint(300, (rows, 128))
    visions = {"ours": VisionConfig(encoder="linear", patch_size=8), "without an encoder": VisionConfig()}
    measures = {name: partial(_text_step, _decoder(vision), tokens, repeats) for name, vision in visions.items()}
    taken = interleave(measures, setup.repetitions)
    what = f"{rows} × 128 tokens of text in a model with an encoder"
    return Row(what, "s", taken["ours"], "without an encoder", taken["without an encoder"], TEXT_GOAL)


def _decoder(vision: VisionConfig) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 300, "max_seq_len": 128, "n_layers": 3, "n_heads": 4, "dim": 96}
    return build_model(LlamaConfig(**sizes, hidden_dim=256, tied=True, vision=vision))


def _text_step(model: nn.Module, tokens: Tensor, repeats: int) -> float:
    return cpu_seconds(lambda: [model(tokens).sum().backward() for _ in range(repeats)]) / repeats


def loader_row(setup: Setup) -> Row:
    """The wait for a batch of images within a step of training."""
    steps = 2 if setup.quick else 10
    experiment = shipped(
        "shapes_captions",
        training={"batches_per_macro_batch": steps, "device": "cpu"},
        tracking={"progress": False, "sample_tokens": 0, "score_samples": 0},
        corpus={"train_samples": 2000, "val_samples": 10, "test_samples": 10},
    )
    dataset: MixedDataset = prepare(experiment.corpus, setup.folder / "data", console=Console(quiet=True))
    store = dataset.sources[0].dataset
    trainer = make_trainer(experiment, store, setup.folder / "run")
    loader = batch_loader(store, experiment.data.batch_size, experiment.data.seq_len)
    measures = {
        "ours": lambda: cpu_seconds(lambda: [loader.next() for _ in range(20)]) / 20,
        "the step": lambda: cpu_seconds(lambda: train_macro_batch(trainer)) / steps,
    }
    taken = interleave(measures, setup.repetitions)
    close(trainer)
    loader.close()
    what = f"loading {experiment.data.batch_size} images of 48 × 48 with their captions"
    return Row(what, "s", taken["ours"], "the step", taken["the step"], WAIT_GOAL)
