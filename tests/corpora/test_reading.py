"""Reading: the pieces of a file are its text, cut at line ends, and every fault is told with its place."""

import codecs
import errno
import gzip
import io
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cleangpt.corpora import Text, prepare_dataset, reading
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
        ("a.jsonl", b'{"texts": "x"}\n', "line 1: no field 'text'; set corpus.text_field; did you mean 'texts'"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: int where text should be"),
        ("a.jsonl", b"[1]\n", "line 1: no field 'text'"),
        ("a.json", b'[{"text": "x"}, {"text": ["y"]}]', "entry 2: list where text should be"),
        ("a.json", b'[{"text": "x"}, {"text": "y"}', r"a\.json: not valid JSON"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]\n', r"a\.json: not valid JSON: Extra data"),
        (
            "a.json",
            b'{\n  "text": "x"\n}\n',
            "line 1: not valid JSON.*; allowed in .json: an array, or a value per line",
        ),
        ("a.json", b"some text\n", "line 1: not valid JSON.*; allowed in .json: an array, or a value per line"),
        ("a.json", b'[{"text": "\xff"}]', r"a\.json: not valid UTF-8 at byte 11"),
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
        list(read_pieces(path, "text"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_is_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'txt'; did you mean 'text'"):
        list(read_pieces(tmp_path / "a.parquet", "txt"))


# The same content in every format ------------------------------------------------------------------------------------
def write_entries(path: Path, values: list[Any]) -> Path:
    """A file of entries with the field text, in the format of its suffix."""
    entries = [{"text": value} for value in values]
    if path.suffix == ".parquet":
        parquet.write_table(arrow.table({"text": arrow.array(values)}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(entries, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


ENTRIES = ["a.jsonl", "a.ndjson", "a.json", "a.parquet"]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_missing_or_empty_text_is_no_document(name: str, tmp_path: Path) -> None:
    pieces = read_pieces(write_entries(tmp_path / name, ["one", None, "", "two", None]))
    assert [piece.text for piece in pieces] == ["one", "two"]
    assert list(read_pieces(write_entries(tmp_path / name, [None, None]))) == []


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("value", [0, False, 0.0, 7, [], ["text"], {"n": None}])
def test_a_value_that_is_not_text_is_refused_even_if_it_is_false(name: str, value: Any, tmp_path: Path) -> None:
    path = write_entries(tmp_path / name, [value])
    with pytest.raises(UserError, match=rf"1: {type(value).__name__} where text should be; set corpus\.text_field$"):
        list(read_pieces(path, "text"))
    with pytest.raises(UserError, match=rf"1: {type(value).__name__} where text should be$"):
        list(read_pieces(path))


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_json_may_be_an_array(layout: Any, tmp_path: Path) -> None:
    content = " \n" + json.dumps([{"text": text} for text in TEXTS], **layout) + "\n"
    pieces = list(read_pieces(write(tmp_path / "a.json", content.encode())))
    assert [piece.text for piece in pieces] == TEXTS
    assert all(piece.ends for piece in pieces)
    assert (
        list(read_pieces(write(tmp_path / "a.json", b"[]"))) == list(read_pieces(write(tmp_path / "b.json", b""))) == []
    )


def test_an_array_too_long_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    path = write_entries(tmp_path / "a.json", ["x" * 100] * 100)
    with pytest.raises(UserError, match="is an array of more than 1,000 bytes; convert it to JSON lines"):
        list(read_pieces(path))


# Byte-order marks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [8, 2**16])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_character(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    text = "one\n\ufeff two"  # the second mark is a character of the text
    content = text.encode("utf-8-sig") if name == "a.txt" else json.dumps({"text": text}).encode("utf-8-sig")
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert "".join(piece.text for piece in read_pieces(path)) == text
    assert list(read_text(write(tmp_path / "mark.txt", codecs.BOM_UTF8))) == []


def test_places_in_a_file_count_its_byte_order_mark(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid UTF-8 at byte 7"):
        list(read_text(write(tmp_path / "a.txt", codecs.BOM_UTF8 + b"text\xff")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_another_encoding_is_refused_by_its_name(name: str, encoding: str, tmp_path: Path) -> None:
    content = ("\ufeff" * encoding.endswith("-be") + '{"text": "x"}\n').encode(encoding)
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=r"is in UTF-16 or UTF-32, by its byte-order mark; convert it to UTF-8"):
        list(read_pieces(path))


# The file that is wrong ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.txt", *ENTRIES, "a.jsonl.gz"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_system_names_the_file(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"text")

    def broken(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", broken)
    monkeypatch.setattr(parquet, "ParquetFile", broken)
    with pytest.raises(UserError) as caught:
        list(read_pieces(path))
    assert str(caught.value) == f"{path}: {os.strerror(number)}"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_an_error_in_the_middle_of_a_file_names_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", lambda *_: Broken())
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: Input/output error$"):
        list(read_pieces(tmp_path / name))


@pytest.mark.parametrize("place", [50, 120, 200, -60, -30, -5])
def test_of_many_parquet_files_the_damaged_one_is_named(place: int, tmp_path: Path) -> None:
    for number in range(3):
        texts = [f"shard {number} document {row} and more words" for row in range(300)]
        parquet.write_table(arrow.table({"text": texts}), tmp_path / f"{number}.parquet", write_page_checksum=True)
    damaged = bytearray((tmp_path / "1.parquet").read_bytes())
    end = place + 40 if place > 0 else None
    damaged[place:end] = b"\xff" * len(damaged[place:end])
    (tmp_path / "1.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"1\.parquet is not an intact Parquet file: ") as caught:
        prepare_dataset(Text(files=(str(tmp_path / "*.parquet"),)), tmp_path / "data", console=Console(quiet=True))
    assert "\n" not in str(caught.value)


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


# Links ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a linked folder, a linked file, and links that lead back in circles."""
    for name in ("texts/a.txt", "texts/deep/b.txt", "elsewhere/c.txt", "elsewhere/more/d.txt", "single.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    for link, target in [
        ("texts/linked", "elsewhere"),
        ("texts/one.txt", "single.txt"),
        ("texts/loop", "texts"),
        ("texts/deep/up", "texts"),
        ("elsewhere/back", "texts"),
        ("texts/again.txt", "texts/a.txt"),
    ]:
        (tmp_path / link).symlink_to(tmp_path / target)
    return tmp_path


FOUND = ["texts/a.txt", "texts/deep/b.txt", "texts/linked/c.txt", "texts/linked/more/d.txt", "texts/one.txt"]


@pytest.mark.parametrize(
    "patterns",
    [
        ["texts"],
        ["texts/"],
        ["texts/**"],
        ["texts/**/*"],
        ["texts/**/*.txt"],
        ["texts/**/**/*.txt"],
        ["tex?s/**/*.txt"],
        ["texts/*.txt", "texts/*/*.txt", "texts/linked/more/d.txt"],
        ["texts", "elsewhere", "single.txt"],
    ],
    ids=lambda patterns: " ".join(patterns),
)
def test_folders_and_globs_find_the_same_files_through_links_each_once(patterns: list[str], linked: Path) -> None:
    found = [path.relative_to(linked).as_posix() for path in find_files(str(linked / pattern) for pattern in patterns)]
    contents = sorted((linked / name).resolve() for name in found)
    assert contents == sorted((linked / name).resolve() for name in FOUND)
    if patterns[0].startswith("texts/**") or patterns == ["texts"]:
        assert found == FOUND


@pytest.mark.parametrize("pattern", ["texts", "texts/*", "texts/**/*.txt"])
@pytest.mark.parametrize("target", ["nothing.txt", "lost.txt"])
def test_a_link_to_nothing_is_not_passed_over(pattern: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", b"x")
    (tmp_path / "texts" / "lost.txt").symlink_to(tmp_path / "texts" / target)
    with pytest.raises(UserError, match=r"lost\.txt is a link to a file that does not exist"):
        find_files([str(tmp_path / pattern)])


def test_names_with_the_characters_of_globs_are_found(tmp_path: Path) -> None:
    for name in ("a[1]/b.txt", "a[1]/c/d.txt", "a[1]/[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, b"x")
    for pattern in ("a[1]", "a[[]1]/**/*.txt", "a*/**"):
        assert len(find_files([str(tmp_path / pattern)])) == 3
    assert find_files([str(tmp_path / "a[1]/[x].txt")]) == [tmp_path / "a[1]/[x].txt"]


def test_files_of_an_unknown_user_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"'~nobody-here/a\.txt': there is no such home folder"):
        find_files(["~nobody-here/a.txt"])


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
