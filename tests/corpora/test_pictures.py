"""Conversations and captions with pictures: packed into rows, each picture with the conversation that shows it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from cleangpt.corpora import prepare
from cleangpt.corpora.pictures import Pictures
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import image_token
from cleangpt.data.records import records_of_row
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.errors import UserError
from tests.corpora.test_hub_text import Hub

SIDE, PATCHES = 4, 4
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
OPTIONS: dict[str, Any] = {"height": SIDE, "width": SIDE, "image_tokens": PATCHES, "tokenizer": "char",
                           "val_fraction": 0.2, "pack": 60}  # fmt: skip


def draw(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, color in COLORS.items():
        Image.new("RGB", (SIDE, SIDE), color).save(folder / f"{name}.png")


def write(path: Path, entries: list[Any]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def asked(name: str, question: str = "Which?") -> dict[str, Any]:
    content = [{"type": "image", "path": f"{name}.png"}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": name}]}


def captioned(name: str) -> dict[str, Any]:
    return {"file_name": f"{name}.png", "text": name}


def prepared(**fields: Any) -> TokenDataset:
    return prepare(Pictures(**{"files": ("made/list.jsonl",)} | OPTIONS | fields), Path("data")).sources[0].dataset


def rows(dataset: TokenDataset) -> list[tuple[str, list[str], list[str]]]:
    """Of every row: its text, the answers that count, and the colours of its pictures, in order."""
    colors = {color: name for name, color in COLORS.items()}
    found = []
    for split in dataset.splits.values():
        for number in range(split.documents):
            tokens, mask = split.read_row(number)
            inputs = records_of_row(split.records, number * split.row_length, len(tokens))
            for end in inputs["images_ends"].tolist():
                assert tokens[end - PATCHES : end] == [image_token(dataset.tokenizer)] * PATCHES
                assert not any(mask[end - PATCHES : end])
            assert tokens.count(image_token(dataset.tokenizer)) == PATCHES * len(inputs["images_ends"])
            answers, runs = [], np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2)
            for begin, end in runs.tolist():
                answers.append(dataset.tokenizer.decode(tokens[begin:end]).removesuffix("\0"))
            shown = [colors[tuple(image[0, 0].tolist())] for image in inputs["images"]]
            found.append((dataset.tokenizer.decode(tokens), answers, shown))
    return found


@pytest.mark.parametrize("entry", [asked, captioned], ids=["conversations", "captions"])
def test_pictures_come_with_what_is_said_of_them(entry: Any, workplace: Path) -> None:
    draw(Path("made"))
    names = [list(COLORS)[number % 3] for number in range(40)]
    write(Path("made/list.jsonl"), [entry(name) for name in names])
    found = rows(prepared())
    assert all(answers == shown for _, answers, shown in found)
    assert sorted(name for _, answers, _ in found for name in answers) == sorted(names)
    assert max(len(shown) for *_, shown in found) > 1  # packed


def test_conversations_may_have_several_pictures_or_none(workplace: Path) -> None:
    draw(Path("made"))
    parts = [
        {"type": "image", "path": "red.png"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "blue.png"},
    ]
    two = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "both"}]}
    none = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    write(Path("made/list.jsonl"), [two, none] * 10)
    for _, answers, shown in rows(prepared()):
        assert shown == [color for answer in answers if answer == "both" for color in ("red", "blue")]


def test_captions_may_be_files_beside_their_pictures(workplace: Path) -> None:
    """Packed together, from several folders; a text without a picture, and a picture without a text, are left out."""
    names = [list(COLORS)[number % 3] for number in range(40)]
    draw(Path("made"))
    for number, name in enumerate(names):
        folder = Path("made", "more" if number % 2 else "")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), COLORS[name]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{name}\n", encoding="utf-8")
    Path("made/notes.txt").write_text("nothing", encoding="utf-8")
    found = rows(prepared(files=("made",)))
    assert all(answers == shown for _, answers, shown in found)
    assert sorted(name for _, answers, _ in found for name in answers) == sorted(names)
    assert max(len(shown) for *_, shown in found) > 1


def test_of_a_folder_a_changed_picture_or_caption_is_noticed(workplace: Path) -> None:
    """And nothing else: pictures beside captions used to be called new."""
    draw(Path("made"))
    for number in range(40):
        shutil.copy("made/red.png", f"made/{number}.png")
        Path(f"made/{number}.txt").write_text("red", encoding="utf-8")
    dataset, corpus = prepared(files=("made",)), Pictures(**{"files": ("made",)} | OPTIONS)
    assert list(corpus.changed_inputs(dataset)) == []
    shutil.copy("made/blue.png", "made/7.png")
    Path("made/40.txt").write_text("red", encoding="utf-8")
    changes = [line.replace(os.sep, "/") for line in corpus.changed_inputs(dataset)]
    assert changes == ["made/7.png has changed", "made/40.txt is a new file"]


def written(name: str) -> dict[str, Any]:
    """A picture as the Hub's datasets have it."""
    return {"bytes": Path(f"made/{name}.png").read_bytes(), "path": f"{name}.png"}


def with_images(name: str) -> dict[str, Any]:
    """As TRL's data."""
    content = [{"type": "text", "text": "Which?"}, {"type": "image", "text": None}]
    answer = [{"type": "text", "text": name}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"images": [written(name)], "messages": messages}


def save_table(entries: list[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)


@pytest.mark.parametrize("hub", [False, True], ids=["here", "hub"])
@pytest.mark.parametrize("kind", ["captions", "messages"])
def test_parquet_may_have_the_pictures_themselves(
    kind: str, hub: bool, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(Path("made"))
    names = [list(COLORS)[number % 3] for number in range(20)]
    entries = [
        with_images(name) if kind == "messages" else {"file_name": written(name), "text": name} for name in names
    ]
    save_table(entries, Path("hub/train/0.parquet"))
    if hub:
        served = Hub(Path("hub"), "someone/pictures", "main")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: served)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", served.hf_hub_download)
    source = {"files": (), "hub_dataset": "someone/pictures/train"} if hub else {"files": ("hub",)}
    found = rows(prepared(**source))
    assert sorted(name for _, answers, _ in found for name in answers) == sorted(names)
    assert all(answers == shown for _, answers, shown in found)


def test_byte_pairs_have_a_token_for_images(workplace: Path) -> None:
    draw(Path("made"))
    write(Path("made/list.jsonl"), [asked(name) for name in COLORS] * 8)
    dataset = prepared(tokenizer="bpe", vocab_size=300)
    assert all(answers == shown for _, answers, shown in rows(dataset))
    assert "<image>" not in dataset.tokenizer.decode(dataset.tokenizer.encode("a").tolist())


def test_a_text_that_spells_the_image_token_is_skipped(workplace: Path) -> None:
    draw(Path("made"))
    write(Path("made/list.jsonl"), [asked("red")] * 10 + [asked("red", "What is <image>?")] * 3)
    dataset = prepared(tokenizer="bpe", vocab_size=300)
    counts = [split["counts"]["conversations skipped, a special token in the text"]
              for split in dataset.description["splits"].values()]  # fmt: skip
    assert sum(counts) == 3


def test_a_picture_is_never_cut(workplace: Path) -> None:
    draw(Path("made"))
    late = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                         {"role": "user", "content": ["x" * 35, {"type": "image", "path": "red.png"}]},
                         {"role": "assistant", "content": "red"}]}  # fmt: skip
    write(Path("made/list.jsonl"), [asked("red")] * 20 + [late])
    assert all("x" not in text for text, *_ in rows(prepared()))


def test_templates_that_read_parts_write_the_images_themselves(workplace: Path) -> None:
    draw(Path("made"))
    write(Path("made/list.jsonl"), [asked(name) for name in COLORS] * 8)
    Path("parts.jinja").write_text(
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        encoding="utf-8",
    )
    dataset = prepared(tokenizer="bpe", vocab_size=300, chat_template="parts.jinja")
    assert all([answer.strip() for answer in answers] == shown for _, answers, shown in rows(dataset))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (captioned("none"), r"none.png: No such file"),
        ({"file_name": "list.jsonl", "text": "a"}, r"list.jsonl is not a picture"),
        ({"file_name": "red.png"}, r"list.jsonl, line 1: no field 'text'; set corpus.caption_field"),
        ({"text": "a"}, r"list.jsonl, line 1: no field 'file_name'; set corpus.image_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "https://a/b.png"}]}]}, "local file"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a"}]}]}, "a part of a message is"),
        ({"messages": []}, r"line 1"),
        ({"messages": "red"}, r"line 1: no list of messages"),
        (["red"], r"line 1"),
        (asked("red") | {"images": ["blue.png"]}, "'images' has more pictures than the messages have places for"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of a message is"),
        ({"file_name": 3, "text": "a"}, r"line 1: int where text should be; set corpus.image_field"),
        *(({"file_name": name, "text": "a"}, r"list.jsonl, line 1: 'file_name' is '.*'; allowed: the path of a local")
          for name in ("", None, "https://a/b.png")),
        *(({"file_name": name, "text": "a"}, r"red.*' is not a path; allowed: ") for name in ("red\0", "red\ud800")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(entry: Any, message: str, workplace: Path) -> None:
    draw(Path("made"))
    write(Path("made/list.jsonl"), [entry])
    with pytest.raises(UserError, match=message):
        prepared()
    assert not list(Path("data").glob("pictures-*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tokenizer": "byte"}, "tokenizer is 'byte'; allowed with pictures: bpe or char"),
     ({"files": ()}, "files is .*; allowed: files or corpus.hub_dataset"),
     ({"hub_dataset": "a/b"}, "files is .*; allowed: files or corpus.hub_dataset"),
     ({"pack": 4}, "pack is 4; allowed: more than corpus.image_tokens"), ({"height": 0}, "height is 0")],
)  # fmt: skip
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pictures(**{"files": ("a",)} | OPTIONS | fields).check()


def test_a_tokenizer_of_bytes_is_refused_since_no_text_says_where_its_pictures_stand(workplace: Path) -> None:
    draw(Path("made"))
    write(Path("made/list.jsonl"), [asked("red"), asked("blue")])
    Path("bytes.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="bytes have no token for images"):
        prepared(tokenizer_file="bytes.json")
