"""Models that read pictures in tiles see what Transformers' processors make of a prompt, and are exported so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedModel,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.data.chat_template import ChatTemplate
from cleangpt.data.images import IMAGE_TOKEN
from cleangpt.data.records import stack_rows
from cleangpt.data.tiles import AROUND, PLACE, WHOLE
from cleangpt.data.tokenizers import train_bpe
from cleangpt.errors import UserError
from cleangpt.inference.images import read_conversation, read_images
from cleangpt.inference.text import prompt_inputs
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.interchange.towers import with_processor
from cleangpt.interchange.vision import config_from_huggingface
from tests.interchange.test_vision import CONTENT, TOWER, theirs

PLACES = [PLACE.format(row, column) for row in range(1, 5) for column in range(1, 5)]
BPE = train_bpe(["red, green and blue\n\n " * 9], 300, [IMAGE_TOKEN, AROUND, WHOLE, "<end_of_utterance>", *PLACES])
EDGES: dict[str, Any] = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 16}}
PROCESSORS = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}
PROMPT = "red <image>\n and <image>, blue?"


def saved(kind: str, folder: Path, **entries: Any) -> PreTrainedModel:
    """A small random model of Transformers', with its tokenizer and the processor of its pictures in a folder."""
    model = theirs(kind, text_config={"vocab_size": BPE.vocab_size, "max_position_embeddings": 256})
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(BPE.library_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    PROCESSORS[kind](**EDGES | entries).save_pretrained(folder)
    return model


def pictures(folder: Path) -> list[Path]:
    """A wide one of several tiles, and a tall one."""
    files = [folder / "a.png", folder / "b.png"]
    for file, size in zip(files, [(20, 70, 3), (90, 41, 3)], strict=True):
        Image.fromarray(np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)).save(file)
    return files


def their_inputs(kind: str, folder: Path, files: list[Path], prompt: str, tokens: int) -> dict[str, Tensor]:
    """By Idefics3's processor; by SmolVLM's image processor and its text, since its processor reads videos as well."""
    images, tokenizer = [Image.open(file) for file in files], AutoTokenizer.from_pretrained(folder)
    reader = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if kind == "idefics3":
        whole = Idefics3Processor(reader, tokenizer, image_seq_len=tokens)
        return dict(whole(images=images, text=prompt, return_tensors="pt"))
    found = reader([images], return_tensors="pt", return_row_col_info=True)
    first, *rest = prompt.split(IMAGE_TOKEN)
    for rows, columns, after in zip(found.pop("rows")[0], found.pop("cols")[0], rest, strict=True):
        first += get_image_prompt_string(rows, columns, tokens, AROUND, IMAGE_TOKEN, WHOLE) + after
    return {**found, **tokenizer(first, return_tensors="pt")}


def our_inputs(checkpoint: Checkpoint, files: list[Path], prompt: str) -> tuple[list[int], dict[str, Tensor]]:
    model = checkpoint.model(torch.device("cpu"))
    return prompt_inputs(checkpoint.tokenizer, prompt, read_images(model, checkpoint.tokenizer, files))


@pytest.mark.default(1)
@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("cut", [True, False])
@torch.no_grad()
def test_a_prompt_has_the_tokens_pixels_and_logits_of_transformers(kind: str, cut: bool, tmp_path: Path) -> None:
    model, files = saved(kind, tmp_path, do_image_splitting=cut), pictures(tmp_path)
    checkpoint = open_checkpoint(f"hf:{tmp_path}")
    vision = checkpoint.config.vision
    expected = their_inputs(kind, tmp_path, files, PROMPT, vision.tokens)
    tokens, inputs = our_inputs(checkpoint, files, PROMPT)
    assert tokens == expected["input_ids"][0].tolist()
    assert len(inputs["images"]) == (2 * 4 + 1 + 4 * 2 + 1 if cut else 2)
    pixels = vision.normalized(inputs["images"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, expected["pixel_values"][0], atol=1e-5, rtol=0)
    ours = checkpoint.model(torch.device("cpu"))(torch.tensor([tokens]), **stack_rows([inputs]))
    kept = {name: expected[name] for name in ("input_ids", "pixel_values", "pixel_attention_mask")}
    torch.testing.assert_close(ours, model(**kept).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.default(1)
@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_exported_prepares_a_prompt_alike(kind: str, cut: bool, tmp_path: Path) -> None:
    saved(kind, tmp_path / "theirs", do_image_splitting=cut)
    files, checkpoint = pictures(tmp_path), open_checkpoint(f"hf:{tmp_path / 'theirs'}")
    export(checkpoint, "hf", tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert isinstance(processor, Idefics3Processor)
    found = processor(images=[Image.open(file) for file in files], text=PROMPT, return_tensors="pt")
    tokens, inputs = our_inputs(checkpoint, files, PROMPT)
    assert tokens == found["input_ids"][0].tolist()
    pixels = checkpoint.config.vision.normalized(inputs["images"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, found["pixel_values"][0], atol=1e-5, rtol=0)
    assert open_checkpoint(f"hf:{tmp_path / 'ours'}").config == checkpoint.config


def test_a_conversation_has_its_pictures_in_tiles(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    saved("idefics3", tmp_path)
    files, checkpoint = pictures(tmp_path), open_checkpoint(f"hf:{tmp_path}")
    source = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    content = [*({"type": "image", "path": str(file)} for file in files), {"type": "text", "text": "What?"}]
    _, tokens, inputs = read_conversation(
        checkpoint.model(torch.device("cpu")), BPE, ChatTemplate(source), [{"role": "user", "content": content}]
    )
    prompt = "user:<image><image>What?<end_of_utterance>\nAssistant:"
    expected = their_inputs("idefics3", tmp_path, files, prompt, checkpoint.config.vision.tokens)
    assert tokens == expected["input_ids"][0].tolist()
    assert len(inputs["images"]) == expected["pixel_values"].shape[1]


IDEFICS = CONTENT | {"model_type": "idefics3", "vision_config": TOWER, "scale_factor": 2}


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"max_image_size": {"longest_edge": 32}}, "max_image_size is 32; allowed: 16, as in config.json"),
        ({"max_image_size": {"height": 16}}, "max_image_size is {'height': 16}; allowed: its longest_edge"),
        ({"size": 56}, "size is 56; allowed: its longest_edge"),
        ({"size": {"height": 56, "width": 56}}, "size is {.*}; allowed: its longest_edge"),
        ({"size": {"longest_edge": 5000}}, "longest_edge is 5000; allowed: .* 4,?096"),
        ({"size": {"longest_edge": "long"}}, "longest_edge is 'long'; allowed"),
        ({"size": {"longest_edge": 0}}, "tiles is True; allowed with longest_edge 0: False"),
        ({"do_resize": False}, "do_resize is False; allowed: True"),
    ],
)
def test_a_processor_of_tiles_that_does_something_else_is_refused(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = Idefics3ImageProcessorPil(**EDGES).to_dict() | entries
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        with_processor(config_from_huggingface(IDEFICS).vision, tmp_path)


def test_entries_that_a_processor_leaves_out_are_transformers_own(tmp_path: Path) -> None:
    vision = config_from_huggingface(IDEFICS).vision
    content = {"max_image_size": {"longest_edge": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert with_processor(vision, tmp_path) == replace(vision, longest_edge=4 * 364, tiles=True)


def test_a_whole_processor_comes_before_that_of_images(tmp_path: Path) -> None:
    """As in Transformers, where a folder has the entries of both."""
    old, new = (Idefics3ImageProcessorPil(**EDGES | {"size": {"longest_edge": edge}}).to_dict() for edge in (32, 56))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old), encoding="utf-8")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": new}), encoding="utf-8")
    assert with_processor(config_from_huggingface(IDEFICS).vision, tmp_path).longest_edge == 56
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").size["longest_edge"] == 56
