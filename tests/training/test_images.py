"""Fine-tuning of models that read images: projector first, then all; adapters, rates by pattern, Muon and muP."""

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cleangpt.checkpoints.checkpoint import best_checkpoint, load_checkpoint
from cleangpt.config import FineTuningConfig, LoRAConfig, MuonConfig, OptimizerConfig, Source
from cleangpt.corpora import prepare
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.pictures import Pictures
from cleangpt.data.images import IMAGE_CHARACTER
from cleangpt.data.records import records_of_row
from cleangpt.distributed.layout import Layout
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models.blocks import hidden_matrices
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.lora import is_adapter
from cleangpt.models.vision import VisionConfig
from cleangpt.tracking.metrics import read_samples
from cleangpt.tracking.report import write_report
from cleangpt.training.launch import check
from cleangpt.training.mup import mup_scales
from cleangpt.training.summary import summary
from cleangpt.training.trainer import Trainer

pytest.importorskip("sklearn")
from cleangpt.corpora.digits import Digits

Build, Open = Callable[..., Experiment], Callable[[Experiment], Trainer]
VIT = VisionConfig(encoder="vit", height=8, width=8, channels=1, patch_size=4, dim=8, n_layers=1, n_heads=2)
CORPUS = Digits(image_tokens=4, shift=0, val_samples=20, test_samples=20)
SHORT: dict[str, Any] = {"training__macro_batches": 1, "tracking__score_samples": 0, "tracking__sample_tokens": 0}
ALL_BUT_THE_PROJECTOR = (
    "token_embedding.*", "position_embedding.*", "blocks.*", "final_norm.*", "vision.encoder.patch_embedding.*",
    "vision.encoder.position_embedding.*", "vision.encoder.blocks.*", "vision.encoder.final_norm.*",
)  # fmt: skip


@pytest.fixture
def experiment(tiny: Build) -> Callable[..., Experiment]:
    def build(vision: VisionConfig = VIT, **fields: Any) -> Experiment:
        seq_len = CORPUS.row_length - 1
        model = GPTConfig(max_seq_len=seq_len, n_layers=2, n_heads=2, dim=16, vision=vision)
        return tiny(corpus=CORPUS, model=model, data__seq_len=seq_len, **SHORT | fields)

    return build


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(trainer: Trainer) -> set[str]:
    """The parameters that training changes."""
    before = weights_of(trainer)
    trainer.train()
    return {name for name, weight in weights_of(trainer).items() if not weight.equal(before[name])}


@pytest.mark.slow
def test_the_projector_is_trained_first_and_then_everything(experiment: Build, trainer: Open) -> None:
    """As LLaVA is, in two experiments; with adapters instead, nothing else is; a rate of 0 stands still."""
    first = trainer(experiment(run_dir="first", fine_tuning=FineTuningConfig(freeze=ALL_BUT_THE_PROJECTOR)))
    assert changed(first) == {"vision.encoder.projector.down.weight", "vision.encoder.projector.down.bias"}
    kept = load_checkpoint(best_checkpoint(Path("first")))
    second = trainer(experiment(run_dir="second", init_from="first", optimizer__lr_factors=(("vision.*", 0.0),)))
    assert all(weight.equal(kept.weights[name]) for name, weight in weights_of(second).items())
    assert changed(second) == {name for name in kept.weights if not name.startswith("vision.")}
    third = trainer(experiment(run_dir="third", init_from="first", training__macro_batches=2))
    unmoved = {"vision.encoder.blocks.0.attention.key.bias"}  # which cancels in the softmax
    assert changed(third) >= kept.weights.keys() - unmoved


@pytest.mark.slow
def test_adapters_read_images_and_are_merged_in_checkpoints(experiment: Build, trainer: Open) -> None:
    trainer(experiment(run_dir="first")).train()
    adapted = trainer(
        experiment(run_dir="adapted", init_from="first", fine_tuning=FineTuningConfig(lora=LoRAConfig(rank=2)))
    )
    assert all(is_adapter(name) for name in changed(adapted))
    base, merged = (load_checkpoint(best_checkpoint(Path(run))).weights for run in ("first", "adapted"))
    moved = {name for name, weight in merged.items() if not weight.equal(base[name])}
    assert moved and all(name.startswith("blocks.") for name in moved) and merged.keys() == base.keys()


@pytest.mark.slow
def test_an_encoder_is_taken_from_another_run(experiment: Build, trainer: Open) -> None:
    """And a decoder from a second one."""
    for seed, run in enumerate(("tower", "decoder")):
        trainer(experiment(run_dir=run, training__seed=seed)).train()
    both = trainer(experiment(run_dir="both", init_from="decoder", encoder_from="tower"))
    tower, decoder = (load_checkpoint(best_checkpoint(Path(run))).weights for run in ("tower", "decoder"))
    for name, weight in weights_of(both).items():
        assert weight.equal((tower if name.startswith("vision.") else decoder)[name])


@pytest.mark.slow
def test_a_source_or_a_model_without_an_encoder_is_refused(experiment: Build, tiny: Build, trainer: Open) -> None:
    trainer(tiny(run_dir="text", **SHORT)).train()
    with pytest.raises(UserError, match=r"reads no images; allowed in encoder_from: a model that does"):
        trainer(experiment(run_dir="other", encoder_from="text"))
    with pytest.raises(UserError, match=r"encoder_from is 'text'; allowed for a model without model.vision.encoder"):
        check(tiny(encoder_from="text"), Layout())


@pytest.mark.slow
@pytest.mark.parametrize("edge", [0, 24])
def test_a_run_says_that_only_prompts_have_tiles(edge: int, experiment: Build, trainer: Open) -> None:
    prepared = experiment(replace(VIT, longest_edge=edge, tiles=edge > 0))
    run, dataset = trainer(prepared), prepare(CORPUS, Path(prepared.data.folder))
    lines = summary(prepared, run.run, dataset, run.model, run.device, run.layout)
    assert [line[:53] for line in lines if line.startswith("pictures")] == [
        "pictures those of the dataset stay whole; sample and "
    ] * (edge > 0)


@pytest.mark.slow
def test_the_image_that_texts_are_sampled_after_is_in_the_report(experiment: Build, trainer: Open) -> None:
    """Once, and not as tokens in the text."""
    trained = trainer(experiment(run_dir="run", tracking__sample_tokens=3))
    trained.train()
    validation = prepare(CORPUS, Path("data")).sources[0].dataset.splits["val"]
    shown = np.asarray(Image.open("run/sample_0.png"))
    assert (shown == records_of_row(validation.records, 0, 4)["images"][0, ..., 0].numpy()).all()
    assert IMAGE_CHARACTER not in read_samples(Path("run"))[0]["text"]
    page = write_report([Path("run")]).read_text(encoding="utf-8")
    assert base64.b64encode(Path("run/sample_0.png").read_bytes()).decode() in page


@pytest.mark.slow
def test_muon_updates_the_decoder_and_adamw_the_encoder(experiment: Build, trainer: Open) -> None:
    trained = trainer(experiment(run_dir="run", optimizer__muon=MuonConfig(lr=1e-2)))
    by_muon = hidden_matrices(trained.model)
    assert by_muon and all(name.startswith("blocks.") for name in by_muon)
    unmoved = {"vision.encoder.blocks.0.attention.key.bias"}  # which cancels in the softmax
    assert changed(trained) >= weights_of(trained).keys() - unmoved


def test_mup_scales_a_linear_encoder_like_an_embedding_and_refuses_convolutions() -> None:
    """The patches' side of its matrix is the same at every width."""
    sizes: dict[str, Any] = {"vocab_size": 9, "max_seq_len": 32, "n_layers": 1, "n_heads": 4, "dim": 64}
    linear = VisionConfig(encoder="linear", height=8, width=8, patch_size=4)
    with_images = mup_scales(GPTConfig(**sizes, vision=linear), OptimizerConfig(lr=1e-2, base_dim=16))
    without = mup_scales(GPTConfig(**sizes), OptimizerConfig(lr=1e-2, base_dim=16))
    scale = with_images.pop("vision.encoder.linear.weight")
    assert (scale.initial, scale.lr) == (1, 1)
    with_images.pop("vision.encoder.linear.bias")
    assert with_images == without
    with pytest.raises(UserError, match="base_dim is 16; allowed for a model with convolutions: None"):
        mup_scales(GPTConfig(**sizes, vision=VIT), OptimizerConfig(lr=1e-2, base_dim=16))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_corpus_that_prepares_pictures_otherwise_than_the_model_is_refused(mixed: bool, experiment: Build) -> None:
    pictures = Pictures(files=("a",), resize="crop", image_tokens=4, pack=9)
    corpus = Mixture(sources=(Source(name="own", corpus=pictures),)) if mixed else pictures
    with pytest.raises(UserError, match=r"corpus.resize is 'crop'; allowed: model.vision.resize, which is 'stretch'"):
        check(replace(experiment(), corpus=corpus), device=torch.device("cpu"))


def test_tensor_parallelism_refuses_an_encoder_that_draws_positions(experiment: Build) -> None:
    gato = replace(VIT, encoder="gato")
    with pytest.raises(
        UserError, match=r"over 2 devices; allowed with model\.vision\.encoder 'gato', .*: 1; use strategy"
    ):
        check(experiment(gato, parallel__strategy="tp"), Layout(tensor=2))
