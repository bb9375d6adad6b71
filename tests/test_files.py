"""What is written is whole or absent, and a sealed folder knows when it was harmed."""

from pathlib import Path

import pytest

from cleangpt import files
from cleangpt.errors import UserError, nearest, require
from cleangpt.files import (
    commit_folder,
    find_corruption,
    read_json,
    read_text,
    recover_folder,
    remove_folder,
    restore,
    sha256,
    write_bytes,
    write_json,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # the half of the new one would take room


def test_a_sealed_folder_is_whole(tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "a").write_bytes(b"1234")
    commit_folder(tmp_path / "x.partial", tmp_path / "x")
    assert find_corruption(tmp_path / "x") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert read_json(tmp_path / "x" / "manifest.json") == {
        "a": {"bytes": 4, "sha256": "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"}
    }


def test_sealing_over_an_older_folder_replaces_it(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        (tmp_path / "x.partial").mkdir()
        (tmp_path / "x.partial" / "a").write_bytes(content)
        commit_folder(tmp_path / "x.partial", tmp_path / "x")
    assert (tmp_path / "x" / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def make(partial: Path, content: bytes) -> None:
    partial.mkdir()
    (partial / "a").write_bytes(content)


def test_a_folder_that_was_moved_aside_comes_back_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames nothing stands under the name; both folders used to be removed as remains."""
    make(tmp_path / "x.partial", b"one")
    commit_folder(tmp_path / "x.partial", tmp_path / "x")
    make(tmp_path / "x.partial", b"two")
    with monkeypatch.context() as patch:
        replace = Path.replace

        def crash(source: Path, target: Path) -> Path:
            if source.name == "x.partial":
                raise KeyboardInterrupt
            return replace(source, target)

        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            commit_folder(tmp_path / "x.partial", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    recover_folder(tmp_path)
    assert find_corruption(tmp_path / "x") == "" and (tmp_path / "x" / "a").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_was_replaced_before_the_crash_is_not_brought_back(tmp_path: Path) -> None:
    make(tmp_path / "x", b"new")
    make(tmp_path / "x.old", b"old")
    restore(tmp_path / "x")
    assert (tmp_path / "x" / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_whose_successor_cannot_take_its_place_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x.partial", b"one")
    commit_folder(tmp_path / "x.partial", tmp_path / "x")
    make(tmp_path / "x.partial", b"two")
    replace = Path.replace

    def refuse(source: Path, target: Path) -> Path:
        if source.name == "x.partial":
            raise OSError(5, "Input/output error")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        commit_folder(tmp_path / "x.partial", tmp_path / "x")
    assert find_corruption(tmp_path / "x") == "" and (tmp_path / "x" / "a").read_bytes() == b"one"


def test_a_folder_with_the_same_bits_is_never_away(tmp_path: Path) -> None:
    """What a resumed run saves again need not be replaced, and whoever reads it meanwhile sees no gap."""
    make(tmp_path / "x.partial", b"one")
    commit_folder(tmp_path / "x.partial", tmp_path / "x")
    before = (tmp_path / "x" / "a").stat().st_ino
    make(tmp_path / "x.partial", b"one")
    commit_folder(tmp_path / "x.partial", tmp_path / "x")
    assert (tmp_path / "x" / "a").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_whose_removal_was_cut_short_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a snapshot under its own name would be taken for a damaged one."""
    make(tmp_path / "x", b"1")
    with monkeypatch.context() as patch:

        def crash(path: Path, ignore_errors: bool = False) -> None:
            if Path(path).exists():
                raise KeyboardInterrupt

        patch.setattr(files.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
    recover_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x.partial", b"1")
    commit_folder(tmp_path / "x.partial", tmp_path / "x")

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(files, "sha256", fail)
    assert "Input/output error" in find_corruption(tmp_path / "x")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "does not exist"),
        ("[]", "is not a manifest"),
        ('{"a": 1}', "is not a manifest"),
        ('{"../a": {"bytes": 1, "sha256": ""}}', "../a is missing"),
        ('{"b": {"bytes": 1, "sha256": ""}}', "b is missing"),
        ('{"a": {"bytes": 9, "sha256": ""}}', "a has 1 bytes, not 9"),
        ('{"a": {"bytes": 1, "sha256": "0"}}', "a does not match its checksum"),
    ],
)
def test_harm_is_named(tmp_path: Path, manifest: str | None, words: str) -> None:
    (tmp_path / "a").write_bytes(b"1")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert words in find_corruption(tmp_path)


def test_json_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "x")
    write_json(tmp_path / "x", {"ä": [1, None]})
    assert read_json(tmp_path / "x") == {"ä": [1, None]}
    assert len(sha256(tmp_path / "x")) == 64


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    """As some editors write it, for instance into a chat template or a tokenizer.json."""
    write_bytes(tmp_path / "x", '{"ä": "\ufeff"}'.encode("utf-8-sig"))
    assert read_text(tmp_path / "x") == '{"ä": "\ufeff"}'
    assert read_json(tmp_path / "x") == {"ä": "\ufeff"}


def test_the_nearest_right_name_is_offered() -> None:
    assert nearest("batch_sise", ["batch_size", "seq_len"]) == "; did you mean 'batch_size'?"
    assert nearest("zzz", ["batch_size"]) == ""


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"needs the package no_such_thing, .*: pip install no_such_thing$"):
        require("no_such_thing.part")
