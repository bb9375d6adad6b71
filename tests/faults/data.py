"""Data that is not what it should be: ids beyond the vocabulary, stores that change, texts that are too short."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.faults import fault
from tests.faults._runs import EXPERIMENT, TRAIN, check_whole, output, run, start, victim
from tests.faults._runs import finish as ended
from tests.faults.concurrency import wait_until


def refused(folder: Path, words: str) -> None:
    """Asserts that the command ends with one line that has these words."""
    before = len(output(folder))
    code = run(folder, *TRAIN)
    said = output(folder)[before:]
    assert code == 2 and "Traceback" not in said and words in said.splitlines()[-1], f"{code}: {said}"


def train_file(folder: Path) -> Path:
    (path,) = folder.glob("data/*/train_00000.bin")
    return path


@fault("a token id beyond the vocabulary in the dataset", short=1, long=20)
def beyond(seed: int, folder: Path) -> None:
    """It is named when it is met, and the run goes on when the store is well again."""
    victim(folder)
    path = train_file(folder)
    good = bytearray(path.read_bytes())
    token = seed * 13 % (len(good) // 2)
    path.write_bytes(good[: 2 * token] + (999).to_bytes(2, "little") + good[2 * token + 2 :])
    refused(folder, f"train_00000.bin, token {token:,}, is 999; allowed: ids below 13, the vocabulary")
    path.write_bytes(good)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


@fault("a dataset edited after the run started", short=1, long=20)
def edited(seed: int, folder: Path) -> None:
    victim(folder)
    process = start(folder, *TRAIN)
    wait_until(lambda: (folder / "run" / "metrics.jsonl").exists(), process)
    process.kill()
    ended(process)
    path = train_file(folder)
    good = bytearray(path.read_bytes())
    bad = bytearray(good)
    bad[2 * (seed * 29 % (len(good) // 2))] ^= 1
    path.write_bytes(bad)
    refused(folder, "train_00000.bin has changed since it was prepared; run cleangpt prepare --again")
    path.write_bytes(good)
    assert run(folder, *TRAIN) == 0, output(folder)
    check_whole(folder)


TEXT = EXPERIMENT.replace("from cleangpt.corpora.adder import Adder", "from cleangpt.corpora.text import Text").replace(
    "score_samples=2", "score_samples=0"
)


def written(folder: Path, corpus: str, **files: str) -> None:
    """An experiment on text of one's own."""
    old = "Adder(digits=1, train_samples=40, val_samples=16, test_samples=8)"
    assert old in TEXT
    (folder / "victim.py").write_text(TEXT.replace(old, corpus), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")


WORDS = "some words that are no great loss, over and over; " * 20


def other_text(folder: Path) -> None:
    written(folder, 'Text(files=("a.txt",))', a_txt=WORDS)
    assert run(folder, *TRAIN, "--training.macro-batches", "2") == 0, output(folder)
    (folder / "a.txt").write_text(WORDS.replace("great", "large"), encoding="utf-8")
    assert run(folder, "prepare", "text", "--files", "a.txt", "--again") == 0, output(folder)
    before = len(output(folder))
    assert run(folder, "resume", "run") == 2
    assert "train_00000.bin is not the one that this run started with" in output(folder)[before:], output(folder)


def tokenizers(folder: Path) -> None:
    sources = ", ".join(
        f'Source(name="{name}", corpus=Text(files=("{name}.txt",), tokenizer="char"))' for name in ("a", "b")
    )
    written(folder, f"Mixture(sources=({sources}))", a_txt=WORDS, b_txt=WORDS.upper())
    path = folder / "victim.py"
    path.write_text("from cleangpt.corpora.mixture import Mixture\n" + path.read_text(encoding="utf-8"))
    refused(folder, "the sources a and b have different tokenizers; allowed: one for all")


def empty_documents(folder: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("", WORDS, "", "", *[WORDS[:90]] * 200, ""))
    written(folder, 'Text(files=("a.jsonl",))', a_jsonl=lines)
    assert run(folder, *TRAIN) == 0, output(folder)


def only_empty_documents(folder: Path) -> None:
    written(folder, 'Text(files=("a.jsonl",))', a_jsonl='{"text": ""}\n' * 9)
    refused(folder, "the dataset is empty: there is no text, or every document is empty")


def empty_packed(folder: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ["", "a", "bc"] * 100)
    written(folder, 'Text(files=("a.jsonl",), pack=6)', a_jsonl=lines)
    assert run(folder, *TRAIN) == 0, output(folder)


def short(folder: Path) -> None:
    written(folder, 'Text(files=("a.txt",), val_fraction=0.5)', a_txt="tiny\n")
    refused(folder, "tokens; allowed: at least 12 tokens (twice data.seq_len)")


def short_packed(folder: Path) -> None:
    written(folder, 'Text(files=("a.txt",), val_fraction=0.5, pack=6)', a_txt="ti\nny\n")
    assert run(folder, *TRAIN) == 0, output(folder)


ODD: list[Callable[[Path], None]] = [
    other_text, tokenizers, empty_documents, only_empty_documents, empty_packed, short, short_packed,
]  # fmt: skip


@fault("another dataset in its place, other tokenizers, empty and short texts", short=len(ODD), long=len(ODD))
def odd(seed: int, folder: Path) -> None:
    ODD[seed](folder)
