"""A dataset is used again where what it was made of is the same; what has changed is named, and never mixed up."""

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cleangpt.corpora import CORPORA, dataset_folder, prepare_dataset
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.base import Corpus
from cleangpt.corpora.conversations import Chat
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.episodes import Episodes
from cleangpt.corpora.fineweb_edu import FineWebEdu
from cleangpt.corpora.hub_text import HubDataset
from cleangpt.corpora.pictures import Pictures
from cleangpt.corpora.preferences import Preferences
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.corpora.text import Text
from cleangpt.corpora.tinystories import TinyStories
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import train_bpe

LINES = "the quick brown fox jumps over a lazy dog\n" * 50
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def opened(corpus: Corpus, folder: Path = Path("data")) -> tuple[TokenDataset, str]:
    """The dataset, and what was printed."""
    said = io.StringIO()
    return prepare_dataset(corpus, folder, console=Console(file=said, width=1000)), said.getvalue()


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def write_chats(name: str, count: int = 60) -> str:
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(count)]
    return write(name, "".join(json.dumps({"messages": messages}) + "\n" for messages in turns))


def write_pages(name: str) -> str:
    return write(name, "".join(json.dumps({"text": f"page {number}"}) + "\n" for number in range(100)))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: texts, conversations, a tokenizer and a chat template."""
    monkeypatch.chdir(tmp_path)
    write("texts/a.txt", LINES)
    write("texts/deep/b.txt", LINES)
    write("texts/.hidden", LINES)
    write("tokenizer.json", train_bpe([LINES], 300).to_json())
    write("hf/tokenizer.json", train_bpe([LINES], 300).to_json())
    write("hf/chat_template.jinja", TEMPLATE)
    write("template.jinja", TEMPLATE)
    write_chats("chats/a.jsonl")
    write_pages("pages/a.jsonl")
    return tmp_path


TEXT, CHAT = Text(files=("texts",)), Chat(files=("chats/*.jsonl",), pack=64, val_fraction=0.2)
OTHER = train_bpe(["zebra " * 100], 290).to_json()
CHANGES: dict[str, tuple[Corpus, Callable[[], object], str]] = {
    "a file changed in a folder": (TEXT, lambda: write("texts/a.txt", LINES * 2), "texts/a.txt has changed"),
    "a file with another time": (TEXT, lambda: os.utime("texts/a.txt", (1, 1)), "texts/a.txt has changed"),
    "a file added to a folder": (TEXT, lambda: write("texts/c.txt", LINES), "texts/c.txt is a new file"),
    "a file added below a folder": (TEXT, lambda: write("texts/deep/c.txt", LINES), "texts/deep/c.txt is a new file"),
    "a file removed from a folder": (TEXT, lambda: Path("texts/a.txt").unlink(), "texts/a.txt was removed"),
    "a file renamed in a folder": (
        TEXT, lambda: Path("texts/a.txt").rename("texts/z.txt"), "texts/z.txt is a new file (one of 2 changes)"
    ),
    "a file added to a glob": (CHAT, lambda: write_chats("chats/b.jsonl"), "chats/b.jsonl is a new file"),
    "a file added to a recursive glob": (
        Text(files=("texts/**/*.txt",)), lambda: write("texts/deep/c.txt", LINES), "texts/deep/c.txt is a new file"
    ),
    "a file added through a link": (
        TEXT, lambda: Path("texts/c.txt").symlink_to(Path(write("elsewhere.txt", LINES)).resolve()),
        "texts/c.txt is a new file",
    ),
    "the folder moved away": (TEXT, lambda: Path("texts").rename("away"), "corpus.files: texts does not exist"),
    "stories added": (
        TinyStories(files=("pages",), tokenizer="byte", val_fraction=0.2),
        lambda: write_pages("pages/b.jsonl"), "pages/b.jsonl is a new"
    ),
    "pages added": (
        FineWebEdu(files=("pages",), tokenizer="byte", val_fraction=0.2),
        lambda: write_pages("pages/b.jsonl"), "pages/b.jsonl is a new file",
    ),
    "the one file changed": (
        ShakespeareChar(file="texts/a.txt"), lambda: write("texts/a.txt", LINES * 2), "texts/a.txt has changed"
    ),
    "the tokenizer": (
        dataclasses.replace(TEXT, tokenizer_file="tokenizer.json"), lambda: write("tokenizer.json", OTHER),
        "the tokenizer tokenizer.json has changed",
    ),
    "the tokenizer in a folder": (
        dataclasses.replace(TEXT, tokenizer_file="hf:hf"), lambda: write("hf/tokenizer.json", OTHER),
        "the tokenizer hf:hf has changed",
    ),
    "the tokenizer of one file": (
        ShakespeareChar(file="texts/a.txt", tokenizer_file="tokenizer.json"), lambda: write("tokenizer.json", OTHER),
        "the tokenizer tokenizer.json has changed",
    ),
    "the tokenizer of an episode's texts": (
        Demonstrations(
            env="MountainCar-v0", played=8, row=43, val_share=0.2, reference_episodes=1, tokenizer_file="tokenizer.json"
        ),
        lambda: write("tokenizer.json", OTHER), "the tokenizer tokenizer.json has changed",
    ),
    "the tokenizer removed": (
        dataclasses.replace(TEXT, tokenizer_file="tokenizer.json"), lambda: Path("tokenizer.json").unlink(),
        "tokenizer.json does not exist",
    ),
    "the chat template": (
        dataclasses.replace(CHAT, chat_template="template.jinja"),
        lambda: write("template.jinja", TEMPLATE.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}")),
        "the chat template of template.jinja has changed",
    ),
    "the chat template in a folder": (
        dataclasses.replace(CHAT, chat_template="hf"), lambda: write("hf/chat_template.jinja", TEMPLATE + "\n"),
        "the chat template of hf has changed",
    ),
    "the tokenizer's chat template": (
        dataclasses.replace(CHAT, tokenizer_file="hf:hf"), lambda: write("hf/chat_template.jinja", TEMPLATE + "\n"),
        "the chat template of hf:hf has changed",
    ),
    "the tokenizer's chat template removed": (
        dataclasses.replace(CHAT, tokenizer_file="hf:hf"), lambda: Path("hf/chat_template.jinja").unlink(),
        "the chat template of hf:hf has changed",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_the_dataset_is_kept_for_its_runs(name: str) -> None:
    corpus, change, words = CHANGES[name]
    before, _ = opened(corpus)
    again, said = opened(corpus)
    assert again.description == before.description
    assert said == ""
    change()
    after, said = opened(corpus)
    assert said.startswith(f"the older dataset {before.folder} is used, though {words}")
    assert said.count("\n") == 1
    assert after.description == before.description


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("corpus", [TEXT, Adder(digits=1)])
def test_rows_of_another_version_of_the_corpus_are_named(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fields, so the same folder, but no longer the same rows."""
    before, _ = opened(corpus)
    monkeypatch.setattr(type(corpus), "rows_version", 2)
    after, said = opened(corpus)
    assert after.description == before.description
    assert said.startswith(f"the older dataset {before.folder} is used, though its rows were made by another version")
    prepare_dataset(corpus, Path("data"), again=True, console=Console(file=io.StringIO()))
    assert opened(corpus)[1] == ""


@pytest.mark.usefixtures("project")
def test_a_dataset_that_says_nothing_has_the_first_version_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = opened(TEXT)
    path = before.folder / "dataset.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    del description["source"]["rows_version"]
    path.write_text(json.dumps(description), encoding="utf-8")
    assert opened(TEXT)[1] == ""
    monkeypatch.setattr(Text, "rows_version", 2)
    assert "its rows were made by another version" in opened(TEXT)[1]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("corpus", [TEXT, CHAT, dataclasses.replace(CHAT, chat_template="template.jinja")])
def test_preparing_again_takes_what_is_there_now(corpus: Any) -> None:
    before, _ = opened(corpus)
    write("texts/c.txt", LINES)
    write_chats("chats/b.jsonl")
    write("template.jinja", TEMPLATE + "\n")
    after = prepare_dataset(corpus, Path("data"), again=True, console=Console(quiet=True))
    assert after.description["sha256"] != before.description["sha256"]
    assert opened(corpus)[1] == ""


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize("corpus", [TEXT, CHAT])
def test_nothing_is_said_where_nothing_has_changed(corpus: Any, tokenizer: str) -> None:
    corpus = dataclasses.replace(corpus, tokenizer=tokenizer, vocab_size=300)
    opened(corpus)
    write("texts/.another_hidden", LINES)
    assert opened(corpus)[1] == ""


@pytest.mark.slow
def test_another_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Stdlib(max_bytes=200_000)
    opened(corpus, tmp_path)
    assert opened(corpus, tmp_path)[1] == ""
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert "is 3.99.0, and its source code may have changed" in opened(corpus, tmp_path)[1]


def test_another_revision_on_the_hub_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = FineWebEdu(tokenizer="byte")
    dataset, _ = opened(TEXT)
    folder = dataset_folder(corpus, Path("data"))
    dataset.folder.rename(folder)
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    description["source"] = {**dataclasses.asdict(corpus.hub_dataset()), "commit": "0", "shards": []}
    write(str(folder / "dataset.json"), json.dumps(description))
    assert opened(corpus)[1] == ""
    monkeypatch.setattr(FineWebEdu, "hub_dataset", lambda _: HubDataset("a/b", "sample/10BT", "refs/pr/1"))
    said = opened(corpus)[1]
    assert "though the repository on the Hub was HuggingFaceFW/fineweb-edu, is a/b" in said
    assert "(one of 2 changes)" in said


# Where datasets are --------------------------------------------------------------------------------------------------
RELATIVE: dict[str, Callable[[str], Corpus]] = {
    "files": lambda root: Text(files=(f"{root}texts",)),
    "one of the files": lambda root: Text(files=("/tmp/elsewhere", f"{root}texts/*.txt")),
    "file": lambda root: ShakespeareChar(file=f"{root}texts/a.txt"),
    "tokenizer_file": lambda root: TinyStories(tokenizer_file=f"{root}tokenizer.json"),
    "a tokenizer's folder": lambda root: TinyStories(tokenizer_file=f"hf:{root}hf"),
    "chat_template": lambda root: Chat(files=("/tmp/chats",), chat_template=f"{root}template.jinja"),
    "preferences": lambda root: Preferences(files=(f"{root}texts",)),
    "pictures": lambda root: Pictures(files=(f"{root}pictures.jsonl",)),
    "episodes": lambda root: Episodes(env="CartPole-v1", files=(f"{root}episodes.jsonl",)),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_projects_that_share_a_data_folder_do_not_share_files_of_one_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for project in ("a", "b"):
        (tmp_path / project / "hf").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / project)
        folders.append([dataset_folder(RELATIVE[name](""), path).name for path in (Path("../data"), tmp_path / "data")])
    assert folders[0][0] == folders[0][1] != folders[1][0] == folders[1][1]


@pytest.mark.parametrize("name", RELATIVE)
def test_files_of_absolute_paths_are_shared_from_everywhere(
    name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        folders.add(dataset_folder(RELATIVE[name](f"{tmp_path}/"), tmp_path / "data"))
    assert len(folders) == 1


@pytest.mark.parametrize("kind", sorted(CORPORA.keys() - {"text", "chat", "preferences", "pictures", "episodes"}))
def test_what_is_generated_or_downloaded_is_shared_from_everywhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        corpus = Demonstrations(env="CartPole-v1") if kind == "demonstrations" else CORPORA[kind]()
        folders.add(dataset_folder(corpus, tmp_path / "data"))
    assert len(folders) == 1


def test_a_project_that_moves_with_its_datasets_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    write("texts/a.txt", LINES)
    for data in ("data", "deeper/data"):
        opened(TEXT, Path(data))
    monkeypatch.chdir(tmp_path)
    Path("old").rename("new")
    monkeypatch.chdir(tmp_path / "new")
    for data in ("data", "deeper/data"):
        assert opened(TEXT, Path(data))[1] == ""


def test_linked_data_folders_are_the_folder_that_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two projects, each with a link named data to one folder."""
    (tmp_path / "shared").mkdir()
    texts = {}
    for project in ("a", "b"):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        Path("data").symlink_to(tmp_path / "shared")
        write("texts/a.txt", f"project {project}\n" * 100)
        dataset, _ = opened(TEXT)
        texts[project] = dataset.tokenizer.decode(dataset.splits["train"].read(0, 10).tolist())
    assert texts == {"a": "project a\n", "b": "project b\n"}
