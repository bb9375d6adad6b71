"""Models that read images have the same logits in Hugging Face's classes and here, both ways."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.commands import main
from cleangpt.data.images import IMAGE_TOKEN, image_token
from cleangpt.data.pictures import read_picture
from cleangpt.data.tokenizers import ByteTokenizer, train_bpe
from cleangpt.errors import UserError
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.interchange.towers import read_tower, read_vision, with_processor
from cleangpt.interchange.vision import config_from_huggingface
from cleangpt.models import build_model
from cleangpt.models.llama import LlamaConfig
from cleangpt.training.finetuning import start_encoder
from tests.interchange.test_huggingface import checkpoint_of, random_weights

BPE = train_bpe(["red, green and blue circles " * 9], 280, [IMAGE_TOKEN])
IMAGE, CPU = image_token(BPE), torch.device("cpu")
TEXT: dict[str, Any] = {
    "vocab_size": BPE.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
CLIP, SIGLIP = TOWER | {"model_type": "clip_vision_model"}, TOWER | {"model_type": "siglip_vision_model"}
WHOLE: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "llava", "vision_config": CLIP},
    "last": {"model_type": "llava", "vision_config": CLIP | {"hidden_act": "gelu"}, "vision_feature_layer": -1},
    "siglip": {"model_type": "llava", "vision_config": SIGLIP, "vision_feature_select_strategy": "full",
               "multimodal_projector_bias": False},
    "mistral": {"model_type": "llava", "vision_config": CLIP, "text_config": {"model_type": "mistral"}},
    "qwen": {"model_type": "llava", "vision_config": CLIP, "text_config": {"model_type": "qwen2"}},
    "tied": {"model_type": "llava", "vision_config": CLIP, "tie_word_embeddings": True},
    "idefics3": {"model_type": "idefics3", "vision_config": TOWER, "scale_factor": 2},
    "smolvlm": {"model_type": "smolvlm", "vision_config": TOWER, "scale_factor": 4},
}  # fmt: skip
CONTENT = WHOLE["clip"] | {"text_config": TEXT}


def theirs(kind: str, **entries: Any) -> PreTrainedModel:
    given = WHOLE[kind] | entries
    text = {"model_type": "llama"} | TEXT | given.get("text_config", {})
    name = "image_token_index" if given["model_type"] == "llava" else "image_token_id"
    config = AutoConfig.for_model(**given | {"text_config": text, name: IMAGE, "pad_token_id": 0})
    return random_weights(AutoModelForImageTextToText.from_config(config))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(BPE.library_json(), encoding="utf-8")
    return folder


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, with an image at different places: ids, images and their ends."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 250, (2, 24), generator=draw)
    ends = torch.tensor([[2 + tokens], [5 + tokens]])
    for row, end in enumerate(ends[:, 0].tolist()):
        ids[row, end - tokens : end] = IMAGE
    return ids, torch.randint(0, 256, (2, 1, 16, 16, 3), generator=draw, dtype=torch.uint8), ends


@torch.no_grad()
def logits_of(checkpoint: Checkpoint) -> Tensor:
    ids, images, ends = inputs(checkpoint.config.vision.tokens)
    return checkpoint.model(CPU)(ids, images=images, images_ends=ends)


@torch.no_grad()
def their_logits(model: PreTrainedModel, config: LlamaConfig) -> Tensor:
    ids, images, _ = inputs(config.vision.tokens)
    pixels = config.vision.normalized(images).permute(0, 1, 4, 2, 3)
    return model(input_ids=ids, pixel_values=pixels if model.config.model_type != "llava" else pixels[:, 0]).logits


@pytest.mark.default(1)
@pytest.mark.parametrize("kind", WHOLE)
def test_what_transformers_saves_has_the_same_logits_here_and_back_there(kind: str, tmp_path: Path) -> None:
    model = theirs(kind)
    checkpoint = open_checkpoint(f"hf:{saved(model, tmp_path / 'theirs')}")
    expected = their_logits(model, checkpoint.config)
    torch.testing.assert_close(logits_of(checkpoint), expected, atol=1e-5, rtol=1e-5)
    export(checkpoint, "hf", tmp_path / "ours")
    back, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(their_logits(back.eval(), checkpoint.config), expected, atol=1e-5, rtol=1e-5)
    again = open_checkpoint(f"hf:{tmp_path / 'ours'}")
    assert again.config == checkpoint.config
    assert all(weight.equal(again.weights[name]) for name, weight in checkpoint.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True])
def test_weights_are_read_under_the_names_of_every_version(later: bool, tmp_path: Path) -> None:
    """As LLaVA was released, and as Transformers has them in memory."""
    model = theirs("clip")
    folder = saved(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    released = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(dict(model.state_dict()) if later else released, folder / "model.safetensors")
    checkpoint = open_checkpoint(f"hf:{folder}")
    torch.testing.assert_close(logits_of(checkpoint), their_logits(model, checkpoint.config), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'; allowed"),
        ({"vision_feature_layer": [1, 2]}, r"vision_feature_layer is \[1, 2\]; allowed: a whole number"),
        ({"vision_feature_layer": 7}, "vision_feature_layer is 7; allowed for 3 blocks"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; allowed"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type is 'dinov2'; allowed: clip_vision"),
        ({"vision_config": CLIP | {"hidden_act": "tanh"}}, "vision_config.hidden_act is 'tanh'; allowed"),
        ({"vision_config": CLIP | {"image_size": [16, 8]}}, "vision_config.image_size is .*; allowed: a whole number"),
        ({"text_config": {"model_type": "gemma"}}, "model_type is 'gemma'; allowed: llama, mistral"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_entry_named(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_huggingface(CONTENT | entries)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"encoder": "linear"}, "model.vision.encoder is 'linear'; allowed"),
        ({"bidirectional": True}, "model.vision.bidirectional is True; allowed"),
        ({"width": 32}, "model.vision.width is 32; allowed"),
        ({"projector_dim": 7}, "model.vision is neither LLaVA's"),
    ],
)
def test_an_encoder_that_hugging_face_does_not_have_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = config_from_huggingface(CONTENT)
    other = replace(config, vision=replace(config.vision, **fields))
    with pytest.raises(UserError, match=message):
        export(checkpoint_of(other, BPE), "hf", tmp_path / "ours")
    with pytest.raises(UserError, match="allowed in GGUF: None"):
        export(checkpoint_of(config, BPE), "gguf", tmp_path / "ours")
    with pytest.raises(UserError, match="bytes have no token for images"):
        export(checkpoint_of(replace(config, vocab_size=257), ByteTokenizer()), "hf", tmp_path / "ours")


# Pictures -------------------------------------------------------------------------------------------------------------
CLIP_PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
PROCESSORS = {
    "clip": CLIP_PROCESSOR,
    "siglip": SiglipImageProcessorPil(size={"height": 16, "width": 16}, resample=2),
}  # fmt: skip


@pytest.mark.default(1)
@pytest.mark.parametrize("size", [(37, 53), (53, 37), (16, 16), (9, 40)])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_picture_becomes_what_the_models_processor_makes_of_it(
    kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """And what is exported prepares it alike."""
    folder = saved(theirs(kind), tmp_path / "theirs")
    PROCESSORS[kind].save_pretrained(folder)
    checkpoint = open_checkpoint(f"hf:{folder}")
    vision = checkpoint.config.vision
    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    ours = vision.normalized(torch.from_numpy(read_picture(tmp_path / "a.png", vision.form)).clone())
    export(checkpoint, "hf", tmp_path / "ours")
    for processor in (PROCESSORS[kind], AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")):
        pixels = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours.permute(2, 0, 1), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"do_pad": True}, "do_pad is True; allowed: False"),
        ({"do_normalize": False}, "do_normalize is False; allowed: True"),
        ({"size": {"shortest_edge": 20}}, "pictures become .* from {'shortest_edge': 20}; allowed: 16"),
        ({"crop_size": {"height": 8, "width": 8}}, "pictures become {'height': 8, 'width': 8}"),
        ({"resample": 0}, "resample is 0; allowed: 1, 2, 3"),
        ({"image_mean": [0.5, 0.4]}, "mean is .*; allowed: a number, or one for each of 3 channels"),
        ({"image_mean": "half"}, r"model.vision.mean is \('h'.*; allowed: a tuple of a number"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = CLIP_PROCESSOR.to_dict() | entries
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        with_processor(config_from_huggingface(CONTENT).vision, tmp_path)


# Towers ---------------------------------------------------------------------------------------------------------------
TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)),
    "clip with text": lambda: CLIPModel(CLIPConfig(vision_config=TOWER, text_config={"vocab_size": 9})),
    "siglip with text": lambda: SiglipModel(SiglipConfig(vision_config=TOWER, text_config={"vocab_size": 9})),
}


@pytest.mark.default(2)
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_an_encoder_starts_from_a_tower_with_the_same_features(kind: str, tmp_path: Path) -> None:
    tower = random_weights(TOWERS[kind]())
    tower.save_pretrained(tmp_path)
    PROCESSORS[kind.split()[0]].save_pretrained(tmp_path)
    vision = replace(read_vision(f"hf:{tmp_path}"), projector_dim=5)
    assert vision.mean == ((0.5,) if "siglip" in kind else tuple(CLIP_PROCESSOR.image_mean))
    config = LlamaConfig(vocab_size=9, max_seq_len=32, n_layers=1, n_heads=2, dim=8, hidden_dim=8, vision=vision)
    model, said = build_model(config), list[str]()
    projector = model.vision.encoder.projector.up.weight.clone()
    start_encoder(f"hf:{tmp_path}", model, config, said.append)
    images = inputs(vision.tokens)[1][:, 0]
    expected = getattr(tower, "vision_model", tower)(vision.normalized(images).permute(0, 3, 1, 2)).last_hidden_state
    features = model.vision.encoder.features(vision.normalized(images))
    torch.testing.assert_close(features, expected[:, -16:], atol=1e-5, rtol=1e-5)
    assert model.vision.encoder.projector.up.weight.equal(projector)
    assert "  vision.encoder.projector.up.weight is not there; it keeps its values" in said


def test_an_encoder_may_end_before_the_towers_last_block_and_other_shapes_are_refused(tmp_path: Path) -> None:
    """As LLaVA takes CLIP."""
    random_weights(TOWERS["clip"]()).save_pretrained(tmp_path)
    vision, said = read_vision(f"hf:{tmp_path}"), list[str]()
    sizes: dict[str, Any] = {"vocab_size": 9, "max_seq_len": 32, "n_layers": 1, "n_heads": 2, "dim": 8}
    config = LlamaConfig(**sizes, vision=replace(vision, n_layers=2))
    start_encoder(f"hf:{tmp_path}", build_model(config), config, said.append)
    assert "  model.vision.n_layers is 2; there it is 3" in said
    config = LlamaConfig(**sizes, vision=replace(vision, dim=32))
    with pytest.raises(UserError, match=r"whose vision.encoder.blocks.0.attention.key.bias is \(16,\) there, and"):
        start_encoder(f"hf:{tmp_path}", build_model(config), config, said.append)
    with pytest.raises(UserError, match=r"has no embeddings\.patch_embedding\.weight, which"):
        (tmp_path / "model.safetensors").unlink()
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        read_tower(tmp_path, replace(vision, final_norm=True))


def test_a_model_without_a_tower_is_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(UserError, match="has no tower of CLIP or SigLIP; allowed: one of clip, siglip"):
        read_vision(f"hf:{tmp_path}")


@pytest.mark.slow
def test_a_released_model_is_sampled_from_trained_on_pictures_and_exported(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with the tokenizer, the processor and the weights of one folder."""
    pytest.importorskip("jinja2")
    folder = saved(theirs("clip"), Path("theirs"))
    CLIP_PROCESSOR.save_pretrained(folder)
    Path("pictures").mkdir()
    for number in range(20):
        Image.new("RGB", (20 + number, 30), (number, 9, 9)).save(f"pictures/{number}.png")
        Path(f"pictures/{number}.txt").write_text("red circles", encoding="utf-8")
    main(["sample", "hf:theirs", "--image", "pictures/0.png", "--max-new-tokens", "3", "--device", "cpu"])
    assert capsys.readouterr().out
    Path("tuned.py").write_text(TUNED, encoding="utf-8")
    main(["train", "tuned.py", "--run-dir", "runs/tuned"])
    log = Path("runs/tuned/log.txt").read_text(encoding="utf-8")
    assert "starting from the weights of theirs" in log and "keeps its" not in log and "in the checkpoint" not in log
    main(["export", "runs/tuned", "--out", "ours"])
    main(["chat", "runs/tuned", "--image", "pictures/0.png", "--message", "What?", "--max-new-tokens", "3"])
    model = AutoModelForImageTextToText.from_pretrained("ours")
    ours = open_checkpoint("runs/tuned")
    torch.testing.assert_close(their_logits(model.eval(), ours.config), logits_of(ours), atol=1e-5, rtol=1e-5)
    ids = AutoTokenizer.from_pretrained("ours").convert_tokens_to_ids(IMAGE_TOKEN)
    assert ids == IMAGE == model.config.image_token_id


TUNED = """
from cleangpt.config import DataConfig, OptimizerConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.pictures import Pictures
from cleangpt.experiment import Experiment
from cleangpt.interchange.huggingface import open_checkpoint

config = open_checkpoint("hf:theirs").config
vision = config.vision
experiment = Experiment(
    name="tuned",
    corpus=Pictures(
        files=("pictures",), tokenizer_file="theirs/tokenizer.json", height=16, width=16, resize="crop",
        image_tokens=vision.tokens, pack=48, val_fraction=0.2,
    ),
    data=DataConfig(seq_len=48, batch_size=2),
    model=config,
    optimizer=OptimizerConfig(lr=1e-3),
    training=TrainingConfig(macro_batches=1, batches_per_macro_batch=2, device="cpu"),
    tracking=TrackingConfig(progress=False, sample_tokens=0),
    init_from="hf:theirs",
)
"""
