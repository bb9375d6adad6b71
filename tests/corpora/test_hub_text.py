"""Corpora of the hub come shard by shard, end at their budget, go on where they were killed; the hub is a folder."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from cleangpt.corpora import dataset_folder, prepare_dataset, text
from cleangpt.corpora.fineweb_edu import FineWebEdu
from cleangpt.corpora.hub_text import HubText
from cleangpt.corpora.openwebtext import OpenWebText
from cleangpt.corpora.text import Text
from cleangpt.corpora.tinystories import TinyStories
from cleangpt.data.dataset import TokenDataset
from cleangpt.errors import UserError

QUIET = Console(quiet=True)
PAGES = [
    f"Page {number} tells of {number * number} cats, and of the hats that they wore in {number}."
    for number in range(900)
]
PLACES = {
    "fineweb": (FineWebEdu, "HuggingFaceFW/fineweb-edu", "main", "sample/10BT"),
    "openwebtext": (OpenWebText, "Skylion007/openwebtext", "refs/convert/parquet", "plain_text/train"),
}


class Hub:
    """Serves the files of a folder as the hub does, and remembers which."""

    def __init__(self, folder: Path, repository: str, revision: str) -> None:
        self.folder, self.repository, self.revision = folder, repository, revision
        self.fetched: list[str] = []

    def dataset_info(self, repository: str, *, revision: str) -> SimpleNamespace:
        assert (repository, revision) == (self.repository, self.revision)
        return SimpleNamespace(sha="0123abc")

    def list_repo_tree(self, repository: str, folder: str, *, recursive: bool, revision: str, repo_type: str) -> Any:
        assert (repository, recursive, revision, repo_type) == (self.repository, True, "0123abc", "dataset")
        yield SimpleNamespace(path=folder)
        for path in sorted((self.folder / folder).rglob("*.*")):
            yield SimpleNamespace(path=path.relative_to(self.folder).as_posix(), size=path.stat().st_size)

    def hf_hub_download(self, repository: str, name: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        assert (repository, repo_type, revision) == (self.repository, "dataset", "0123abc")
        self.fetched.append(Path(name).name)
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.folder / name, local_dir / name))


def serve(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch, shards: int = 3) -> tuple[type[HubText], Hub]:
    """A hub of some shards of pages."""
    kind, repository, revision, inside = PLACES[place]
    write_shards(folder / "hub" / inside, shards)
    hub = Hub(folder / "hub", repository, revision)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    return kind, hub


def write_shards(folder: Path, shards: int) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("no shard", encoding="utf-8")
    for number in range(shards):
        table = pyarrow.table({"text": PAGES[number::shards], "id": list(range(len(PAGES[number::shards])))})
        pyarrow.parquet.write_table(table, folder / f"00{number}_00000.parquet")


def documents(store: TokenDataset) -> list[str]:
    found = []
    for split, part in store.splits.items():
        starts = np.fromfile(store.folder / f"{split}_documents.bin", "<u8")
        for begin, end in pairwise([*starts.tolist(), part.tokens]):
            found.append(store.tokenizer.decode(part.read(begin, end - begin).tolist()))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_corpus_is_streamed_from_the_hub_shard_by_shard(
    place: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, hub = serve(tmp_path, place, monkeypatch)
    store = prepare_dataset(
        kind(tokenizer=tokenizer, vocab_size=300, val_fraction=0.1), tmp_path / "data", console=QUIET
    )
    assert sorted(documents(store)) == sorted(PAGES)
    assert hub.fetched == ["000_00000.parquet", "001_00000.parquet", "002_00000.parquet"]
    assert not list((tmp_path / "data" / "downloads").rglob("*.parquet"))
    assert 50 < store.splits["val"].documents < 130
    assert store.description["source"]["commit"] == "0123abc"


def test_shards_may_be_kept_and_are_then_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, hub = serve(tmp_path, "fineweb", monkeypatch)
    corpus = kind(tokenizer="byte", keep_shards=True)
    first = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    again = prepare_dataset(corpus, tmp_path / "data", again=True, console=QUIET)
    assert len(hub.fetched) == 3 and first.description == again.description


def test_only_as_many_tokens_are_fetched_as_the_budget_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, hub = serve(tmp_path, "fineweb", monkeypatch)
    monkeypatch.setattr(text, "GROUP", 2000)
    corpus = kind(tokenizer="byte", max_tokens=10_000, val_fraction=0.2)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert 10_000 <= store.splits["train"].tokens < 10_000 + 2 * 2000
    assert not (tmp_path / "data" / "downloads").exists() or not list((tmp_path / "data" / "downloads").iterdir())
    assert hub.fetched == ["000_00000.parquet"]
    assert sorted(documents(store)) == sorted(PAGES[0::3][: len(documents(store))])


def test_local_files_are_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, hub = serve(tmp_path, "fineweb", monkeypatch)
    local = kind(files=(str(tmp_path / "hub/sample/10BT/*.parquet"),), tokenizer="byte", val_fraction=0.2)
    assert sorted(documents(prepare_dataset(local, tmp_path / "data", console=QUIET))) == sorted(PAGES)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in PAGES), encoding="utf-8")
    lines = dataclasses.replace(local, files=(str(tmp_path / "a.jsonl"),))
    assert sorted(documents(prepare_dataset(lines, tmp_path / "data", console=QUIET))) == sorted(PAGES)
    short = dataclasses.replace(lines, max_tokens=1000)
    monkeypatch.setattr(text, "GROUP", 500)
    assert len(documents(prepare_dataset(short, tmp_path / "data", console=QUIET))) < 30
    assert not hub.fetched


def test_a_tokenizer_of_hugging_face_s_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in PAGES), encoding="utf-8")
    learned = prepare_dataset(
        Text(files=(str(tmp_path / "a.jsonl"),), tokenizer="bpe", vocab_size=300), tmp_path / "learned", console=QUIET
    )
    kind, _ = serve(tmp_path, "fineweb", monkeypatch)
    corpus = kind(tokenizer_file=f"hf:{learned.folder}", val_fraction=0.1)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert store.tokenizer.to_json() == learned.tokenizer.to_json()


def test_the_stories_of_the_hub_are_split_as_their_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for name, pages in {"train-00000-of-00002-aa": PAGES[:400], "train-00001-of-00002-bb": PAGES[400:800],
                        "validation-00000-of-00001-cc": PAGES[800:]}.items():  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table({"text": pages}), folder / f"{name}.parquet")
    hub = Hub(tmp_path / "hub", "roneneldan/TinyStories", "main")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    store = prepare_dataset(TinyStories(edition="parquet", vocab_size=300), tmp_path / "data", console=QUIET)
    assert store.splits["val"].documents == 100
    assert sorted(documents(store)) == sorted(PAGES)
    few = prepare_dataset(TinyStories(edition="parquet", vocab_size=300, max_tokens=1), tmp_path / "few", console=QUIET)
    assert few.splits["val"].documents == 100 and few.splits["train"].documents == 400


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_hub_text import *

hub = Hub(Path({hub!r}), "HuggingFaceFW/fineweb-edu", "main")
import huggingface_hub
huggingface_hub.HfApi, huggingface_hub.hf_hub_download = lambda: hub, hub.hf_hub_download
from cleangpt.corpora import base, text
from cleangpt.data.writer import DatasetWriter

text.GROUP, base.COMMIT_SECONDS = 5000, 0
append, left = DatasetWriter.append, [{appends}]

def counting(self, *args, **options):
    append(self, *args, **options)
    left[0] -= 1
    if left[0] < 0:
        print(*hub.fetched, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

DatasetWriter.append = counting
prepare_dataset({corpus!r}, Path("data"), console=QUIET)
print(*hub.fetched)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte", pytest.param("bpe", marks=pytest.mark.torture)])
def test_a_killed_stream_goes_on_without_the_shards_that_are_done(
    tokenizer: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _ = serve(workplace, "fineweb", monkeypatch)
    corpus = kind(tokenizer=tokenizer, vocab_size=300, val_fraction=0.2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    fetched = []
    for appends in (5, 10, 100):
        code = KILLED.format(
            tests=str(Path(__file__).parent), hub=str(workplace / "hub"), appends=appends, corpus=corpus
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == (0 if appends == 100 else -signal.SIGKILL), done.stderr
        fetched.append([name[:3] for name in done.stdout.split()])
    assert fetched == [["000"], ["001"], ["002"]]
    monkeypatch.setattr(text, "GROUP", 5000)
    whole = prepare_dataset(corpus, workplace / "whole", console=QUIET)
    assert TokenDataset(dataset_folder(corpus, workplace / "data")).description == whole.description


@pytest.mark.slow
def test_without_a_network_one_line_says_which_files_to_fetch(workplace: Path) -> None:
    code = (
        "from pathlib import Path\nfrom rich.console import Console\nfrom cleangpt.errors import UserError\n"
        "from cleangpt.corpora import FineWebEdu, OpenWebText, TinyStories, prepare_dataset\n"
        "for corpus in (FineWebEdu(), OpenWebText(), TinyStories(edition='parquet')):\n"
        "    try: prepare_dataset(corpus, Path('data'), console=Console(quiet=True))\n"
        "    except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "HF_HOME": "hub"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    fineweb, openwebtext, stories = done.stdout.splitlines()
    assert fineweb.startswith("cannot download HuggingFaceFW/fineweb-edu from the Hugging Face hub (")
    assert fineweb.endswith(
        "fetch the .parquet files of sample/10BT elsewhere and give --files their folder (in train: --corpus.files)"
    )
    assert "files of plain_text (revision refs/convert/parquet) elsewhere" in openwebtext
    assert "files of data elsewhere" in stories
    assert not Path("data").exists() or not list(Path("data").iterdir())


def test_a_dataset_without_shards_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _ = serve(tmp_path, "fineweb", monkeypatch, shards=0)
    with pytest.raises(UserError, match="HuggingFaceFW/fineweb-edu has no Parquet files in sample/10BT; fetch"):
        prepare_dataset(kind(), tmp_path / "data", console=QUIET)


@pytest.mark.parametrize("corpus", [FineWebEdu(max_tokens=0), TinyStories(max_tokens=0)])
def test_a_budget_of_nothing_is_refused(corpus: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.max_tokens is 0; allowed: a whole number of 1 or more"):
        prepare_dataset(corpus, tmp_path, console=QUIET)
