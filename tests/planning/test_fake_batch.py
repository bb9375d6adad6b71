"""What a plan counts is a batch as the model and its objective read it."""

import dataclasses
from typing import Any

import pytest
import torch

from cleangpt.errors import UserError
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.models import build_model
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.objectives import NextToken
from cleangpt.planning.fake_batch import fake_batch
from cleangpt.planning.workload import measure

TOKENS = torch.zeros(2, 40, dtype=torch.long)


@pytest.mark.default(2)
@pytest.mark.parametrize("encoder", ["linear", "gato", "vit"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_row_full_of_images_counts_their_encoder(encoder: Any, bidirectional: bool) -> None:
    """As many images as a row has room for: the encoder's products, of each image's patches."""
    vision = VisionConfig(encoder=encoder, height=16, width=16, patch_size=4, dim=16, n_layers=1, n_heads=2,
                          bidirectional=bidirectional)  # fmt: skip
    plain = GPTConfig(vocab_size=32, max_seq_len=40, n_layers=2, n_heads=2, dim=32)
    with torch.device("meta"):
        models = [build_model(plain), build_model(dataclasses.replace(plain, vision=vision))]
    batch = fake_batch(models[1], NextToken(), TOKENS)
    assert batch.inputs["images"].shape == (2, 2, 16, 16, 3), "of 16 tokens each, in 40"
    text, with_images = (measure(model, NextToken(), 2, 40, torch.float32, False).rest.forward for model in models)
    counted = with_images.matmul_flops - text.matmul_flops
    if encoder == "linear":
        assert counted == 2 * 64 * (4 * 4 * 3) * 32, "64 patches of 48 numbers"
    else:
        assert counted > 2 * 64 * (4 * 4 * 3) * 32


def test_vectors_and_places_are_read_where_a_model_reads_them() -> None:
    experiment = load_experiment(experiments()["gato_vector"])
    with torch.device("meta"):
        model = build_model(experiment.model)
    inputs = fake_batch(model, NextToken(), TOKENS).inputs
    assert inputs["vectors"].shape == (2, 40, experiment.model.vector) and inputs["vectors_ends"].shape == (2, 40)
    assert inputs["places"].shape == (2, 40) and inputs["images"].shape[1] == 1


class Listening(GPT):
    """A model that reads what no plan knows."""

    inputs = frozenset({"sound"})


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match="Listening cannot be planned: it reads sound"):
        fake_batch(Listening(GPTConfig(vocab_size=8, max_seq_len=8, n_layers=1, n_heads=1, dim=8)), NextToken(), TOKENS)
