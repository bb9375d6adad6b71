"""Reading: the pieces of a file are its text, cut at line ends, and every fault is told with its place."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.corpora import reading
from cleangpt.corpora.reading import find_files, read_pieces, read_separated, read_text, split_tail
from cleangpt.errors import UserError

TEXTS = ["first\nstory", "zweite Geschichte", "第三个故事 🙂", "fourth"]
lines = st.text(st.sampled_from("ab é漢🙂\n\r"), min_size=1, max_size=120)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 8)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@settings(max_examples=60)
@given(text=lines, block=st.integers(4, 20))
def test_pieces_are_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, block: int) -> None:
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        pieces = list(read_text(path))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].read == len(text.encode())
    assert all(one.read < two.read for one, two in pairwise(pieces))


@pytest.mark.usefixtures("small_blocks")
def test_pieces_end_at_line_ends(tmp_path: Path) -> None:
    pieces = read_text(write(tmp_path / "a", b"one\ntwo\nthree\nfour\nfive"))
    assert [piece.text for piece in pieces] == ["one\ntwo\n", "three\n", "four\nfive"]


def test_a_long_file_is_read_in_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"some words in a line\n" * 1_000_000)
    tracemalloc.start()
    characters = sum(len(piece.text) for piece in read_text(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters == 21_000_000
    assert peak < 1_000_000


@settings(max_examples=60)
@given(text=lines, block=st.integers(4, 20), fraction=st.floats(0.05, 0.95))
def test_a_tail_is_cut_off_at_a_line_or_a_character(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int, fraction: float
) -> None:
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text.encode())
    start = int(len(text.encode()) * fraction)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        pieces = list(split_tail(read_text(path), start))
    parts = {split: [piece for piece in pieces if piece.split == split] for split in ("train", "val")}
    assert "".join(piece.text for split in parts.values() for piece in split) == text
    for part in filter(None, parts.values()):
        assert [piece.ends for piece in part] == [False] * (len(part) - 1) + [True]


def test_a_tail_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"one\ntwo\nthree\nfour\n")
    assert [(piece.split, piece.text) for piece in split_tail(read_text(path), 8)] == [
        ("train", "one\ntwo\n"),
        ("val", "three\nfour\n"),
    ]
    assert [piece.text for piece in split_tail(read_text(path), 9)] == ["one\ntwo\nthree\n", "four\n"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def write_parquet(path: Path) -> None:
    parquet.write_table(arrow.table({"text": TEXTS, "n": [1, 2, 3, 4]}), path, row_group_size=2)


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl(TEXTS[:2])) + zstandard.compress(jsonl(TEXTS[2:]))
    ),
    "a.parquet": write_parquet,
    "A.JSONL": lambda path: path.write_bytes(jsonl(TEXTS)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_documents(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    pieces = list(read_pieces(tmp_path / name))
    assert [piece.text for piece in pieces] == TEXTS
    assert all(piece.ends for piece in pieces)
    assert pieces[-1].read == (tmp_path / name).stat().st_size


def test_empty_documents_and_lines_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": ""}\n\n{"text": "x"}\n  \n')
    assert [piece.text for piece in read_pieces(path)] == ["x"]
    assert list(read_text(write(tmp_path / "empty.txt", b""))) == []


@pytest.mark.usefixtures("small_blocks")
def test_separated_documents_are_found_across_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"One day.\nMore.\n<|end|>\nTwo.\n<|end|>\n\n<|end|>\n Three.")
    pieces = list(read_separated(path, "<|end|>"))
    assert [piece.text for piece in pieces] == ["One day.\nMore.", "Two.", "Three."]
    assert all(piece.ends for piece in pieces)


def test_a_file_without_separators_is_not_gathered_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    monkeypatch.setattr(reading, "LONGEST", 20)
    with pytest.raises(UserError, match=r"no <\|end\|> in 20 characters"):
        list(read_separated(write(tmp_path / "a.txt", b"line\n" * 10), "<|end|>"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good lines\n" * 3 + b"bad \xff here", "not valid UTF-8 at byte 37"),
        ("a.txt", "cut é".encode()[:-1], "not valid UTF-8 at byte 4"),
        ("a.txt", b"\x80" * 30, "not valid UTF-8 at byte 0"),
        ("a.txt", b"some lines\n" * 2 + b"a\0b", "binary file .*at byte 23"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "line 2: not valid UTF-8 at byte 10"),
        ("a.jsonl", b'{"texts": "x"}\n', "line 1: no text in a field 'text'.*did you mean 'texts'"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: no text in a field 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: no text"),
        ("a.jsonl", b'{"text": "a\\u0000"}\n', "line 1: a zero character"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "line 1: an unpaired surrogate"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl.gz", b"not gzip", "corrupt"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS * 100))[:-20], "corrupt"),
        ("a.jsonl.zst", b"not zstd", "corrupt"),
        ("a.parquet", b"not parquet", "not an intact Parquet file"),
    ],
)
def test_a_faulty_file_is_told_in_one_line_with_the_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_pieces(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_is_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'txt'; did you mean 'text'"):
        list(read_pieces(tmp_path / "a.parquet", "txt"))
    with pytest.raises(UserError, match="row 1: int where text should be"):
        list(read_pieces(tmp_path / "a.parquet", "n"))


def test_files_are_found_by_path_glob_and_folder(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", ".hidden/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")

    def found(*patterns: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in find_files(str(tmp_path / p) for p in patterns)]

    assert found("b.txt") == ["b.txt"]
    assert found("*.txt") == ["b.txt"]
    assert found("**/*.txt", "b.txt") == ["b.txt", "deep/c.txt"]
    assert found(".") == ["a.md", "b.txt", "deep/c.txt"]
    assert found(".e.txt") == [".e.txt"]
    (tmp_path / "nothing").mkdir()
    for pattern, message in [("none.txt", "does not exist"), ("*.zip", "names no file"), ("nothing", "names no file")]:
        with pytest.raises(UserError, match=message):
            found(pattern)
    with pytest.raises(UserError, match="give at least one"):
        find_files([])


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    content = b'{"text": "one"}\n{"text": "' + b"a" * 10**7
    for name, packed in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content)),
                         ("a.jsonl.zst", zstandard.compress(content))):  # fmt: skip
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(UserError, match=rf"{name}, line 2 has more than 1,000 bytes"):
            list(read_pieces(tmp_path / name))
