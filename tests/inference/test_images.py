"""Generation from prompts with images: each row has its own, whatever else is in the batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cleangpt.data.chat_template import PLAIN, ChatTemplate, plain_template
from cleangpt.data.images import IMAGE_CHARACTER, IMAGE_TOKEN, image_token
from cleangpt.data.records import stack_rows
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, train_bpe
from cleangpt.errors import UserError
from cleangpt.inference.chat import answer
from cleangpt.inference.engine import Engine
from cleangpt.inference.images import ImagePrompt, read_conversation, read_images, read_prompt
from cleangpt.inference.sampling import GREEDY
from cleangpt.inference.text import prompt_inputs
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.vision import VisionConfig

CPU = torch.device("cpu")
VISION = VisionConfig(encoder="linear", height=4, width=4, patch_size=2, bidirectional=True)  # 4 tokens
TOKENIZER = CharTokenizer("abcdefg" + IMAGE_CHARACTER)


def model_of(vision: VisionConfig = VISION) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(GPTConfig(vocab_size=8, max_seq_len=16, n_layers=2, n_heads=2, dim=16, vision=vision))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(seed: int, count: int = 1) -> dict[str, torch.Tensor]:
    pixels = torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {"images": pixels, "images_ends": 4 * torch.arange(1, count + 1)}


@torch.no_grad()
def greedy(model: LanguageModel, tokens: list[int], inputs: dict[str, torch.Tensor], count: int) -> list[int]:
    """Token by token, from everything at once."""
    found = list(tokens)
    for _ in range(count):
        found.append(int(model(torch.tensor([found]), **stack_rows([inputs]))[0, -1].argmax()))
    return found[len(tokens) :]


@pytest.mark.parametrize("cached", [True, False])
def test_equal_tokens_with_other_images_are_other_prompts(cached: bool) -> None:
    """Together, with one of two images and one of none; the second request comes later."""
    model = model_of()
    prompts = [([7] * 4 + [1], images(1)), ([7] * 4 + [1], images(2)), ([7] * 8 + [1, 2], images(3, 2)), ([1, 2], {})]
    engine = Engine(model, CPU, cached=cached)
    ids = {}
    for number, (tokens, inputs) in enumerate(prompts):
        ids[engine.submit(tokens, max_new_tokens=5, inputs=inputs)] = number
        engine.step()
    ids = dict(sorted(ids.items()))
    completions = dict(engine.completions())
    for request, number in ids.items():
        assert completions[request].ids == greedy(model, *prompts[number], 5)
    alone = [greedy(model, *prompt, 5) for prompt in prompts]
    assert alone[0] != alone[1], "or the test would show nothing"


def test_a_row_that_outgrows_the_context_loses_its_images_with_their_tokens() -> None:
    model, inputs = model_of(), images(1, 2)
    tokens = [1, 2, *[7] * 8]
    inputs["images_ends"] = torch.tensor([6, 10])
    request = Engine(model, CPU)
    number = request.submit(tokens, max_new_tokens=12, inputs=inputs)
    found = dict(request.completions())[number].ids
    # 16 tokens fit; the 17th comes from the last 8 of them, of which the first two are the second image's last.
    first = greedy(model, tokens, inputs, 7)
    kept = [*tokens, *first][-8:]
    later = greedy(model, kept, {"images": inputs["images"], "images_ends": inputs["images_ends"] - 9}, 5)
    assert found == first + later


@pytest.mark.parametrize(
    ("text", "tokens", "ends"),
    [
        ("bc", [*[7] * 8, 1, 2], [4, 8]),
        (None, [7] * 8, [4, 8]),
        ("<image>b<image>c", [*[7] * 4, 1, *[7] * 4, 2], [4, 9]),
        ("bc<image><image>", [1, 2, *[7] * 8], [6, 10]),
    ],
)
def test_files_stand_at_the_start_of_a_prompt_or_where_it_says(
    text: str | None, tokens: list[int], ends: list[int], tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    prompt = read_images(model_of(), TOKENIZER, [tmp_path / "a.png"] * 2)
    found, inputs = prompt_inputs(TOKENIZER, text, prompt)
    assert found == tokens and inputs["images_ends"].tolist() == ends
    assert (inputs["images"][1].numpy() == array).all()


class Begun(ByteTokenizer):
    """Bytes, after a token that begins every text."""

    prefix = (5,)

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.concatenate([[5], super().encode(text)])


def test_a_prefix_stays_first() -> None:
    prompt = ImagePrompt(images(0)["images"], 9, 2, [[9]])
    assert prompt_inputs(Begun(), "a", prompt)[0] == [5, 9, 9, 97]
    assert prompt_inputs(Begun(), "a<image>b", prompt)[0] == [5, 97, 9, 9, 98]


def test_a_prompt_has_a_place_for_every_picture(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for text, count in (("a<image>b<image>", 1), ("<image>", 2), ("<image><image>", 0), ("<image>", 0)):
        message = f"the prompt has {text.count(IMAGE_TOKEN)} <image> for {count} picture{'s' * (count != 1)}; allowed"
        with pytest.raises(UserError, match=message):
            prompt_inputs(TOKENIZER, text, read_prompt(model_of(), TOKENIZER, text, [tmp_path / "a.png"] * count))


def test_a_prompt_beyond_the_context_would_lose_its_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    prompt = read_prompt(model_of(), TOKENIZER, "", [tmp_path / "a.png"] * 2)  # the model reads 16 tokens
    assert len(prompt_inputs(TOKENIZER, "a" * 8, prompt)[0]) == 16
    with pytest.raises(UserError, match="17 tokens, of which 8 are pictures; allowed: at most 16"):
        prompt_inputs(TOKENIZER, "a" * 9, prompt)


def test_a_long_conversation_forgets_its_pictures_like_its_text(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    messages, template = saved_pictures(tmp_path), ChatTemplate(PLAIN, {"eos_token": "."})
    assert len(read_conversation(model_of(), BPE, template, messages)[1]) > 16
    with pytest.raises(UserError, match="8 are pictures; allowed: at most 16"):
        read_conversation(model_of(), BPE, template, messages[:1])


def test_a_prompt_without_pictures_is_text() -> None:
    """And so is <image>, for a model that reads none."""
    assert read_prompt(model_of(), BPE, "\ufffc", []) is None
    assert read_prompt(model_of(VisionConfig()), TOKENIZER, "<image>\ufffc", []) is None
    with pytest.raises(UserError, match=r"the prompt has the character U\+FFFC.*; write <image>"):
        read_prompt(model_of(), TOKENIZER, "a\ufffc", [])


BPE = train_bpe(["user assistant red green blue " * 9], 300, [IMAGE_TOKEN])
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "<image> or "}, {"type": "image", "path": "a.png"},
                                 {"type": "image", "path": "b.png"}, {"type": "text", "text": "?"}]},
    {"role": "user", "content": "ab"},
]  # fmt: skip
TWICE = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"


def saved_pictures(folder: Path) -> list[dict[str, Any]]:
    """The conversation, with its two pictures in a folder."""
    for value, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (4, 4), (value, 9, 9)).save(folder / name)
    return json.loads(json.dumps(CHAT).replace('"path": "', f'"path": "{folder.as_posix()}/'))


@pytest.mark.parametrize("template", [PARTS, PLAIN], ids=["parts", "plain"])
def test_a_conversation_shows_its_pictures_where_they_stand(template: str, tmp_path: Path) -> None:
    """Whether its template reads parts or texts; the token that a message spells is text."""
    pytest.importorskip("jinja2")
    messages = saved_pictures(tmp_path)
    _, tokens, inputs = read_conversation(model_of(), BPE, ChatTemplate(template, {"eos_token": "."}), messages)
    image = image_token(BPE)
    before = tokens[: tokens.index(image)]
    assert tokens.count(image) == 8 and BPE.decode(before).endswith("<image> or ")
    assert inputs["images_ends"].tolist() == [len(before) + 4, len(before) + 8]
    assert tokens[len(before) : len(before) + 8] == [image] * 8
    assert inputs["images"][:, 0, 0, 0].tolist() == [0, 1]


def test_an_answer_depends_on_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    characters = CharTokenizer("\nabcdefghijklmnopqrstuvwxyz?<> " + IMAGE_CHARACTER, "\n")
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 32, "max_seq_len": 64, "n_layers": 2, "n_heads": 2, "dim": 16}
    model = build_model(GPTConfig(**size, tied=False, vision=VISION))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    template = plain_template(characters)
    found = set()
    for messages in (saved_pictures(tmp_path), [{"role": "user", "content": "<image> or ?"}, CHAT[1]]):
        pieces = answer(model.eval(), characters, template, messages, CPU, max_new_tokens=6, sampling=GREEDY)
        found.add("".join(pieces))
    assert len(found) == 2


@pytest.mark.parametrize(
    "template, text, message",
    [
        (TWICE, "ab", "the chat template writes 4 of 2 pictures"),
        (PLAIN, IMAGE_CHARACTER, r"a message has the character U\+FFFC"),
    ],
)
def test_a_picture_that_would_not_stand_once_is_refused(template: str, text: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    messages = [*saved_pictures(tmp_path), {"role": "user", "content": text}]
    with pytest.raises(UserError, match=message):
        read_conversation(model_of(), BPE, ChatTemplate(template, {"eos_token": "."}), messages)


def test_a_model_or_a_tokenizer_without_images_refuses_them(tmp_path: Path) -> None:
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png is given, but the model reads no images"):
        read_images(model_of(VisionConfig()), TOKENIZER, [tmp_path / "a.png"])
    with pytest.raises(UserError, match="the tokenizer has no token for images"):
        read_images(model_of(), CharTokenizer("ab"), [tmp_path / "a.png"])
