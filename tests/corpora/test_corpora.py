"""Preparing a corpus: what each one makes, that interruption costs nothing, and that errors leave nothing."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cleangpt.config import CorpusConfig
from cleangpt.corpora import CORPORA, Corpus, base, dataset_folder, prepare_dataset, reading, shakespeare_char, text
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.corpora.text import Text
from cleangpt.corpora.tinystories import EDITIONS, TinyStories
from cleangpt.data.dataset import CARD, TokenDataset
from cleangpt.data.tokenizers import BPETokenizer, train_bpe
from cleangpt.data.writer import DatasetWriter
from cleangpt.errors import UserError
from cleangpt.validation import from_json, to_json

QUIET = Console(quiet=True)
ROMAN = "".join(f"line {number} of a story about cats and hats, {number * number} of them.\n" for number in range(4000))


def text_of(store: TokenDataset, split: str) -> str:
    return store.tokenizer.decode(store.splits[split].read(0, store.splits[split].tokens).tolist())


def document_ids(store: TokenDataset, split: str) -> list[str]:
    part = store.splits[split]
    starts = np.fromfile(store.folder / f"{split}_documents.bin", "<u8")
    bounds = [*starts.tolist(), part.tokens]
    return [store.tokenizer.decode(part.read(a, b - a).tolist()) for a, b in pairwise(bounds)]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def write_jsonl(path: Path, texts: list[str]) -> str:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


# Every corpus --------------------------------------------------------------------------------------------------------


REQUIRED: dict[str, dict[str, Any]] = {
    **{kind: {"files": ("a", "b")} for kind in ("text", "chat", "preferences", "pictures")},
    "demonstrations": {"env": "CartPole-v1"}, "episodes": {"env": "CartPole-v1", "files": ("a", "b")},
}  # fmt: skip
"""The fields without a default."""


@pytest.mark.parametrize("kind", CORPORA)
def test_a_configuration_survives_json(kind: str) -> None:
    cls: Any = CORPORA[kind]
    corpus = cls(**REQUIRED.get(kind, {}))
    entry = json.loads(json.dumps(to_json(corpus, CORPORA)))
    assert entry["kind"] == kind
    assert from_json(CorpusConfig, entry, CORPORA) == corpus


@pytest.mark.parametrize("kind", CORPORA)
def test_every_field_says_what_it_is(kind: str) -> None:
    """The command line shows the text under each field; none may lack one."""
    modules = {sys.modules[cls.__module__].__file__ for cls in CORPORA[kind].__mro__ if cls.__module__ != "builtins"}
    source = "".join(Path(str(name)).read_text(encoding="utf-8") for name in modules)
    for field in dataclasses.fields(CORPORA[kind]):
        assert re.search(rf'^    {field.name}: .*\n    """', source, re.MULTILINE), field.name


def test_these_have_an_environment() -> None:
    scored = {kind for kind, corpus in CORPORA.items() if corpus.environment is not Corpus.environment}
    assert scored == {
        "adder", "adder_chat", "multiplier", "fable_openings", "fable_preferences", "digits", "shapes_captions",
        "shapes_vqa", "demonstrations", "episodes", "rendered_words",
    }  # fmt: skip


def test_each_set_of_fields_has_its_own_folder(tmp_path: Path) -> None:
    folders = [dataset_folder(Adder(digits=digits), tmp_path).name for digits in (1, 2, 2)]
    assert re.fullmatch(r"adder-[0-9a-f]{8}", folders[0])
    assert folders[1] == folders[2] != folders[0]


def test_a_corpus_of_ones_own_must_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Adder):
        pass

    with pytest.raises(UserError, match=re.escape("CORPORA['mine'] = Mine")):
        prepare_dataset(Mine(digits=1), tmp_path, console=QUIET)
    with pytest.raises(UserError, match="a CorpusConfig; allowed: a subclass"):
        prepare_dataset(CorpusConfig(), tmp_path, console=QUIET)
    monkeypatch.setitem(CORPORA, "mine", Mine)
    assert prepare_dataset(Mine(digits=1), tmp_path, console=QUIET).description["corpus"]["kind"] == "mine"


def test_a_store_is_opened_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_dataset(Adder(digits=1), tmp_path, console=QUIET)
    monkeypatch.setattr(Adder, "prepare", lambda *_: pytest.fail("prepared twice"))
    assert prepare_dataset(Adder(digits=1), tmp_path, console=QUIET).description == first.description


def test_again_makes_it_anew(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", ROMAN)
    corpus = Text(files=(name,))
    prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    write(tmp_path / "a.txt", ROMAN * 2)
    said = io.StringIO()
    assert prepare_dataset(corpus, tmp_path / "data", console=Console(file=said)).splits["train"].documents == 1
    assert "a.txt has changed; to use what is there now, run cleangpt prepare with --again" in said.getvalue()
    store = prepare_dataset(corpus, tmp_path / "data", again=True, console=QUIET)
    assert sum(split.text_bytes for split in store.splits.values()) == 2 * len(ROMAN)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [store.folder.name]


def test_a_store_that_was_being_replaced_when_a_crash_came_is_opened(tmp_path: Path) -> None:
    store = prepare_dataset(Adder(digits=1), tmp_path, console=QUIET)
    made = (store.folder / "dataset.json").stat().st_mtime_ns
    store.folder.rename(store.folder.with_name(store.folder.name + ".old"))
    assert (
        prepare_dataset(Adder(digits=1), tmp_path, console=QUIET).folder / "dataset.json"
    ).stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [store.folder]


def test_the_card_tells_the_facts(tmp_path: Path) -> None:
    said = io.StringIO()
    texts = ["x" * length for length in (1, 2, 3, 4, 7, 8, 100)] * 20
    corpus = Text(files=(write_jsonl(tmp_path / "a.jsonl", texts),), val_fraction=0.2)
    store = prepare_dataset(corpus, tmp_path / "data", console=Console(file=said, width=60))
    card = (store.folder / CARD).read_text(encoding="utf-8")
    assert card in said.getvalue()
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in card.splitlines() if "|" in line
    }
    for name, split in store.splits.items():
        documents, tokens, text_bytes, per_token, longest = rows[name]
        assert (int(documents), int(tokens.replace(",", ""))) == (split.documents, split.tokens)
        assert int(text_bytes.replace(",", "")) == split.text_bytes == split.tokens - split.documents
        assert float(per_token) == pytest.approx(split.text_bytes / split.tokens, abs=5e-4)
        assert int(longest) == 101
    histogram = {tuple(map(int, m.groups()[:2])): int(m[3]) for m in re.finditer(r"(\d+) to (\d+)  \S* *(\d+)\n", card)}
    assert histogram == {(2, 3): 40, (4, 7): 40, (8, 15): 40, (64, 127): 20}
    digests = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n"
                      for file in sorted(store.folder.glob("*.bin")))  # fmt: skip
    assert hashlib.sha256(digests.encode()).hexdigest() in card
    assert "257 tokens" in card


# Shakespeare ---------------------------------------------------------------------------------------------------------


def made_shakespeare() -> str:
    """As many characters as the real text, of as many kinds."""
    kinds = "".join(map(chr, range(32, 32 + 64))) + "\n"
    return "".join(np.random.default_rng(0).choice(list(kinds), 1_115_394))


@pytest.mark.slow
def test_shakespeare_is_split_as_nanogpt_splits_it(tmp_path: Path) -> None:
    text = made_shakespeare()
    said = io.StringIO()
    name = write(tmp_path / "input.txt", text)
    store = prepare_dataset(ShakespeareChar(file=name), tmp_path / "data", console=Console(file=said))
    characters = sorted(set(text))
    assert store.vocab_size == 65
    assert store.tokenizer.eos_id is None
    for split, part in [("train", text[:1_003_854]), ("val", text[1_003_854:])]:
        ids = store.splits[split].read(0, store.splits[split].tokens)
        assert ids.tolist() == [characters.index(character) for character in part]
        assert store.splits[split].documents == 1
    assert store.splits["val"].tokens == 111_540
    assert "not the usual input.txt" in said.getvalue()


def test_a_part_of_shakespeare_may_be_held_out_before_the_validation_split(tmp_path: Path) -> None:
    text = made_shakespeare()[:10_007]
    corpus = ShakespeareChar(file=write(tmp_path / "input.txt", text), held_out=0.05)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert text_of(store, "train") == text[: 9006 - 500]
    assert text_of(store, "test") == text[9006 - 500 : 9006]
    assert text_of(store, "val") == text[9006:]
    with pytest.raises(UserError, match=r"corpus\.held_out is 0\.9; allowed: from 0 to below 0\.9"):
        prepare_dataset(dataclasses.replace(corpus, held_out=0.9), tmp_path / "data", console=QUIET)


def test_characters_of_several_bytes_are_split_by_character(tmp_path: Path) -> None:
    text = "é漢🙂a" * 5
    store = prepare_dataset(ShakespeareChar(file=write(tmp_path / "a.txt", text)), tmp_path / "data", console=QUIET)
    assert (text_of(store, "train"), text_of(store, "val")) == (text[:18], text[18:])


def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such server; a server that sends another file."""
    monkeypatch.setattr(shakespeare_char, "URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(
        UserError, match=r"^cannot download http://127.0.0.1:9/input.txt \(.*\): fetch it elsewhere and"
    ):
        prepare_dataset(ShakespeareChar(), tmp_path / "data", console=QUIET)
    other = tmp_path / "other.txt"
    other.write_text("another text", encoding="utf-8")
    monkeypatch.setattr(shakespeare_char, "URL", other.as_uri())
    with pytest.raises(
        UserError, match=r"other.txt is not the expected file \(its SHA-256 differs\): fetch it elsewhere"
    ):
        prepare_dataset(ShakespeareChar(), tmp_path / "data", console=QUIET)
    assert not list((tmp_path / "data").rglob("*.txt*"))


def test_shakespeare_is_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = ROMAN.encode()
    source = tmp_path / "served.txt"
    source.write_bytes(content)
    monkeypatch.setattr(shakespeare_char, "URL", source.as_uri())
    monkeypatch.setattr(shakespeare_char, "SIZE", len(content))
    monkeypatch.setattr(shakespeare_char, "SHA256", hashlib.sha256(content).hexdigest())
    store = prepare_dataset(ShakespeareChar(), tmp_path / "data", console=QUIET)
    assert text_of(store, "train") + text_of(store, "val") == ROMAN
    source.unlink()
    assert (
        prepare_dataset(ShakespeareChar(), tmp_path / "data", again=True, console=QUIET).description
        == store.description
    )


# The standard library ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_standard_library_is_whole_modules_of_this_python(tmp_path: Path) -> None:
    store = prepare_dataset(Stdlib(max_bytes=1_000_000), tmp_path, console=QUIET)
    assert 500_000 < sum(split.text_bytes for split in store.splits.values()) <= 1_000_000
    names = {
        Path(name).as_posix(): Path(name).read_bytes().decode() for name, _, _ in store.description["source"]["files"]
    }
    documents = document_ids(store, "train") + document_ids(store, "val")
    assert sorted(documents) == sorted(names.values())
    assert not [
        name for name in names if re.search("/(tests?|site-packages|idlelib|lib2to3)/", name.split("/lib/")[-1])
    ]
    version = ".".join(map(str, sys.version_info[:3]))
    assert store.description["source"]["python"].startswith(version)
    assert f"Python {version}" in (store.folder / CARD).read_text(encoding="utf-8")


def test_modules_left_out_and_held_out(tmp_path: Path) -> None:
    names = [f"m{number}.py" for number in range(100)]
    for name in [*names, "test/t.py", "site-packages/s.py", "pkg/tests/t.py", "pkg/in.py", "empty.py", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "" if name == "empty.py" else "pass\n")
    files = Stdlib(val_fraction=0.1).files(tmp_path)
    assert [file.path.relative_to(tmp_path).as_posix() for file in files] == sorted([*names, "pkg/in.py"])
    assert sum(piece.split == "val" for file in files for piece in file.pieces()) == 10
    with pytest.raises(UserError, match="no source code"):
        Stdlib().files(tmp_path / "pkg")


@pytest.mark.slow
def test_the_standard_library_as_byte_pairs(tmp_path: Path) -> None:
    store = prepare_dataset(Stdlib(tokenizer="bpe", vocab_size=600, max_bytes=200_000), tmp_path, console=QUIET)
    assert isinstance(store.tokenizer, BPETokenizer)
    assert store.vocab_size == 600
    names = [Path(name) for name, _, _ in store.description["source"]["files"]]
    assert sorted(document_ids(store, "train") + document_ids(store, "val")) == sorted(
        name.read_bytes().decode() for name in names
    )
    assert sum(s.text_bytes for s in store.splits.values()) > 1.5 * sum(s.tokens for s in store.splits.values())


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_text_file_gives_its_tail_to_validation(tokenizer: Any, tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", ROMAN)
    corpus = Text(files=(name,), tokenizer=tokenizer, vocab_size=400, val_fraction=0.1)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    train, val = (text_of(store, split).replace("\0", "") for split in ("train", "val"))
    assert train + val == ROMAN
    assert val.startswith("line ")
    assert len(val) / len(ROMAN) == pytest.approx(0.1, abs=0.001)
    for split in store.splits.values():
        assert split.documents == 1
        assert split.read(split.tokens - 1, 1)[0] == store.tokenizer.eos_id


def test_many_files_are_held_out_whole(tmp_path: Path) -> None:
    texts = [f"file {number}\n" for number in range(300)]
    (tmp_path / "in").mkdir()
    for number, content in enumerate(texts):
        write(tmp_path / "in" / f"{number}.txt", content)
    store = prepare_dataset(Text(files=(str(tmp_path / "in"),), val_fraction=0.2), tmp_path / "data", console=QUIET)
    train, val = document_ids(store, "train"), document_ids(store, "val")
    assert sorted(train + val) == sorted(texts)
    assert 30 < len(val) < 90


def test_documents_of_json_lines_are_held_out_whole_and_keep_their_order(tmp_path: Path) -> None:
    texts = [f"document {number} ü" for number in range(500)]
    corpus = Text(files=(write_jsonl(tmp_path / "a.jsonl", texts),), val_fraction=0.2)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    train, val = document_ids(store, "train"), document_ids(store, "val")
    assert sorted(train + val) == sorted(texts)
    assert 60 < len(val) < 140
    assert train == [text for text in texts if text in set(train)]
    assert store.splits["val"].text_bytes == sum(len(text.encode()) for text in val)


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    given = train_bpe([ROMAN], 300)
    name = write(tmp_path / "mine.json", given.to_json())
    corpus = Text(files=(write(tmp_path / "a.txt", ROMAN),), tokenizer_file=name)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert json.loads(store.tokenizer.to_json()) == json.loads(given.to_json())


def test_the_tokenizer_learns_from_a_bounded_sample_of_the_training_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SAMPLE", 1000)
    seen: list[str] = []
    monkeypatch.setattr(text, "train_bpe", lambda texts, size: train_bpe(seen.extend(texts) or seen, size))
    files = tuple(write(tmp_path / f"{name}.txt", name * 30_000 + ROMAN) for name in "ab")
    prepare_dataset(Text(files=files, tokenizer="bpe", vocab_size=300), tmp_path / "data", console=QUIET)
    assert seen == ["a" * 500, "b" * 500]


def test_the_tokenizer_learns_nothing_from_validation_text(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "to be or not to be\n" * 100 + "zebra\n" * 100)
    corpus = Text(files=(name,), tokenizer="bpe", vocab_size=400, val_fraction=0.25)
    vocabulary = json.loads(prepare_dataset(corpus, tmp_path / "data", console=QUIET).tokenizer.to_json())["model"][
        "vocab"
    ]
    assert "be" in vocabulary
    assert not [token for token in vocabulary if "ze" in token]


def test_a_document_in_many_groups_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Text(files=(write(tmp_path / "a.txt", ROMAN),))
    whole = prepare_dataset(corpus, tmp_path / "whole", console=QUIET)
    assert all(split.documents == 1 for split in whole.splits.values())
    monkeypatch.setattr(text, "GROUP", 1000)
    monkeypatch.setattr(reading, "BLOCK", 700)
    parts = prepare_dataset(corpus, tmp_path / "parts", console=QUIET)
    assert parts.description["sha256"] == whole.description["sha256"]
    assert parts.description["splits"] == whole.description["splits"]


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    corpus = Text(files=(write(tmp_path / "a.txt", ROMAN),), tokenizer="bpe", vocab_size=400)
    code = (
        "import sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from cleangpt.corpora import Text, prepare_dataset\n"
        "prepare_dataset(eval(sys.argv[1]), Path(sys.argv[2]), console=Console(quiet=True))\n"
    )
    for threads in ("1", "3"):
        command = [sys.executable, "-c", code, repr(corpus), str(tmp_path / threads)]
        settings = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads}
        subprocess.run(command, env=environment() | settings, check=True)
    one, three = (TokenDataset(dataset_folder(corpus, tmp_path / threads)) for threads in ("1", "3"))
    assert one.description == three.description


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Peak memory of a process that prepares four times the text is the same but for a few megabytes."""
    code = (
        "import sys, tracemalloc; from pathlib import Path; from rich.console import Console\n"
        "from cleangpt.corpora import prepare_dataset, text, Text\n"
        "text.GROUP = 2**18\n"
        "tracemalloc.start()\n"
        "prepare_dataset(Text(files=(sys.argv[1],)), Path(sys.argv[2]), console=Console(quiet=True))\n"
        "print(tracemalloc.get_traced_memory()[1])\n"
    )
    peaks = []
    for times in (1, 4):
        name = write(tmp_path / f"{times}.txt", ROMAN * 20 * times)
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(tmp_path / "data")],
            env=environment(),
            capture_output=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 2_000_000 < len(ROMAN) * 20 * 4


# TinyStories ---------------------------------------------------------------------------------------------------------

STORIES = [f"Once there was a cat named Tom {number}.\nHe had {number} hats." for number in range(200)]
VALID = ["A dog ran.", "A bird sang."]


def test_stories_of_files_are_split_by_their_names(tmp_path: Path) -> None:
    train = write(tmp_path / EDITIONS["v2"][0], "\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    valid = write(tmp_path / EDITIONS["v2"][1], "\n<|endoftext|>\n".join(VALID))
    store = prepare_dataset(TinyStories(files=(train, valid), vocab_size=300), tmp_path / "data", console=QUIET)
    assert document_ids(store, "train") == STORIES
    assert document_ids(store, "val") == VALID
    part = store.splits["val"]
    assert int((part.read(0, part.tokens) == store.tokenizer.eos_id).sum()) == 2


def test_stories_without_a_validation_file_are_split_by_hash(tmp_path: Path) -> None:
    corpus = TinyStories(files=(write_jsonl(tmp_path / "a.jsonl", STORIES),), vocab_size=300, val_fraction=0.2)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert sorted(document_ids(store, "train") + document_ids(store, "val")) == sorted(STORIES)


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (
            STORIES,
            [""],
            'the split val is empty; it comes from the files with "valid" in their name; give stories there',
        ),
        ([""], VALID, 'the split train is empty; it comes from the files without "valid" in their name'),
        (STORIES[:1], None, "the split val is empty; give more documents or change corpus.val_fraction"),
    ],
)
def test_a_split_without_stories_is_told_with_what_fills_it(
    train: list[str], valid: list[str] | None, message: str, tmp_path: Path
) -> None:
    files = [write_jsonl(tmp_path / "train.jsonl", train)]
    files += [] if valid is None else [write_jsonl(tmp_path / "valid.jsonl", valid)]
    assert_refused(TinyStories(files=tuple(files), tokenizer="byte"), tmp_path / "data", f"^{message}")


def test_stories_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / EDITIONS["v1"][0], "<|endoftext|>".join(STORIES))
    write(tmp_path / EDITIONS["v1"][1], "<|endoftext|>".join(VALID))

    def served(repository: str, name: str, *, repo_type: str) -> str:
        assert (repository, repo_type) == ("roneneldan/TinyStories", "dataset")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", served)
    store = prepare_dataset(TinyStories(edition="v1", vocab_size=300), tmp_path / "data", console=QUIET)
    assert document_ids(store, "val") == VALID


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", [{"HF_HUB_OFFLINE": "1"}, pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.torture)]
)
def test_without_the_hub_it_says_which_files_to_fetch(network: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom rich.console import Console\nfrom cleangpt.errors import UserError\n"
        "from cleangpt.corpora import TinyStories, prepare_dataset\n"
        "try: prepare_dataset(TinyStories(), Path('data'), console=Console(quiet=True))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | network | {"HF_HOME": str(tmp_path / "hub")},
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
    )
    assert "give --files TinyStoriesV2-GPT4-train.txt TinyStoriesV2-GPT4-valid.txt" in done.stdout
    assert done.stdout.count("\n") == 1


# Interruption --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from cleangpt.corpora import Text, Adder, prepare_dataset, base, text, arithmetic, reading
from cleangpt.data.writer import DatasetWriter

reading.BLOCK, text.GROUP, base.COMMIT_SECONDS, arithmetic.ROWS = 2000, 5000, 0, 1000
commit, append, left = DatasetWriter.commit, DatasetWriter.append, [int(sys.argv[3])]

def counting(self, *args, **options):
    append(self, *args, **options)
    left[0] -= 1
    if left[0] < 0:
        for file in self._files.values():
            file.flush()
        os.kill(os.getpid(), SIGNAL)

DatasetWriter.append = counting
prepare_dataset(eval(sys.argv[1]), Path(sys.argv[2]), console=Console(quiet=True))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "arithmetic"])
def test_a_killed_preparation_goes_on_and_ends_the_same(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed hard three times, each time in the middle of a group that is not committed."""
    name = write(tmp_path / "a.txt", ROMAN)
    corpus: Corpus = Text(files=(name,), tokenizer=tokenizer, vocab_size=300) if tokenizer != "arithmetic" else Adder()
    corpus = dataclasses.replace(corpus, train_samples=20_000) if isinstance(corpus, Adder) else corpus
    kill = "signal.SIGKILL" if hasattr(signal, "SIGKILL") else "signal.SIGTERM"
    code = KILLED.replace("SIGNAL", kill)
    partial = Path(f"{dataset_folder(corpus, tmp_path / 'data')}.partial")
    positions = []
    for appends in (3, 7, 12):
        command = [sys.executable, "-c", code, repr(corpus), str(tmp_path / "data"), str(appends)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode not in (0, 1, 2), done.stderr
        positions.append(json.loads((partial / "journal.json").read_text(encoding="utf-8"))["position"])
    assert positions == [3, 10, 22]
    monkeypatch.setattr(text, "GROUP", 5000)
    monkeypatch.setattr(reading, "BLOCK", 2000)
    monkeypatch.setattr("cleangpt.corpora.arithmetic.ROWS", 1000)
    resumed = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    whole = prepare_dataset(corpus, tmp_path / "whole", console=QUIET)
    assert resumed.description == whole.description
    assert not partial.exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "GROUP", 5000)
    monkeypatch.setattr(reading, "BLOCK", 2000)
    monkeypatch.setattr(base, "COMMIT_SECONDS", 0)
    corpus, append, calls = Text(files=(write(tmp_path / "a.txt", ROMAN),)), DatasetWriter.append, []

    def interrupted(self: DatasetWriter, *args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        append(self, *args, **options)

    monkeypatch.setattr(DatasetWriter, "append", interrupted)
    said = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(corpus, tmp_path / "data", console=Console(file=said))
    assert "resumes from here" in said.getvalue()
    before = len(calls)
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert text_of(store, "train") + text_of(store, "val") == ROMAN
    assert len(calls) - before < len(ROMAN) / 5000 - 5


# Errors --------------------------------------------------------------------------------------------------------------


def assert_refused(corpus: Corpus, folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare_dataset(corpus, folder, console=QUIET)
    assert "\n" not in str(caught.value)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", ROMAN.encode() + b"\xff", r"a\.txt is not valid UTF-8 at byte"),
        ("a.txt", ROMAN.encode() + b"\0", r"a\.txt is a binary file"),
        ("a.txt", b"", "it is empty"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "the dataset is empty: there is no text, or every document is"),
        ("a.jsonl", b'{"text": "x"}\n' * 9 + b"{", r"a\.jsonl, line 10: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "one document"}\n',
            "the split val is empty; give more documents or change corpus",
        ),
        ("a.txt", b"x", "the split train is empty"),
    ],
)
def test_bad_text_is_one_line_and_leaves_nothing(
    name: str, content: bytes, message: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "COMMIT_SECONDS", 0)
    (tmp_path / name).write_bytes(content)
    assert_refused(Text(files=(str(tmp_path / name),), tokenizer=tokenizer), tmp_path / "data", message)


@pytest.mark.parametrize("place", ["open", "write", "fsync", "commit_folder"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    targets = {
        "open": "cleangpt.data.writer.write_text",
        "write": "cleangpt.data.writer.DatasetWriter._write",
        "fsync": "cleangpt.data.writer.DatasetWriter._flush",
        "commit_folder": "cleangpt.data.writer.commit_folder",
    }
    corpus = Text(files=(write(tmp_path / "a.txt", ROMAN),))
    with monkeypatch.context() as patch:
        patch.setattr(targets[place], full)
        assert_refused(corpus, tmp_path / "data", "the disk is full while preparing")
    assert text_of(prepare_dataset(corpus, tmp_path / "data", console=QUIET), "val")


def test_an_older_store_survives_a_failure(tmp_path: Path) -> None:
    corpus = Text(files=(write(tmp_path / "a.txt", ROMAN),))
    store = prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        prepare_dataset(corpus, tmp_path / "data", again=True, console=QUIET)
    TokenDataset(store.folder).verify()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [store.folder.name]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (Text(files=("no/such.txt",)), r"no/such\.txt does not exist"),
        (Text(files=()), "give at least one"),
        (Text(files=("x",), val_fraction=0.0), r"corpus\.val_fraction is 0\.0"),
        (Text(files=("x",), vocab_size=5), r"corpus\.vocab_size is 5"),
        (Stdlib(val_fraction=0.9), r"corpus\.val_fraction is 0\.9"),
        (Stdlib(max_bytes=1), r"corpus\.max_bytes is 1"),
        (Stdlib(vocab_size=1), r"corpus\.vocab_size is 1"),
        (TinyStories(val_fraction=0.9), r"corpus\.val_fraction is 0\.9"),
        (TinyStories(vocab_size=1), r"corpus\.vocab_size is 1"),
        (TinyStories(files=("no.txt",)), r"no\.txt does not exist"),
        (ShakespeareChar(file="no.txt"), r"corpus\.file: no\.txt does not exist"),
    ],
)
def test_a_wrong_field_is_one_line_and_makes_nothing(corpus: Corpus, message: str, tmp_path: Path) -> None:
    assert_refused(corpus, tmp_path / "data", message)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    corpus = Text(files=(write(tmp_path / "a.txt", ROMAN),), tokenizer_file="no.json")
    assert_refused(corpus, tmp_path / "data", r"no\.json does not exist")


def test_an_empty_shakespeare_is_told(tmp_path: Path) -> None:
    assert_refused(ShakespeareChar(file=write(tmp_path / "a.txt", "")), tmp_path / "data", "is empty")
