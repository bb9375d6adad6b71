"""What is written is whole or absent, and a sealed folder knows when it was harmed."""

from pathlib import Path

import pytest

from cleangpt import files
from cleangpt.errors import UserError, nearest, require
from cleangpt.files import damage, read_json, seal, sha256, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_sealed_folder_is_whole(tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "a").write_bytes(b"1234")
    seal(tmp_path / "x.partial", tmp_path / "x")
    assert damage(tmp_path / "x") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert read_json(tmp_path / "x" / "manifest.json") == {
        "a": {"bytes": 4, "sha256": "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"}
    }


def test_sealing_over_an_older_folder_replaces_it(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        (tmp_path / "x.partial").mkdir()
        (tmp_path / "x.partial" / "a").write_bytes(content)
        seal(tmp_path / "x.partial", tmp_path / "x")
    assert (tmp_path / "x" / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


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
    assert words in damage(tmp_path)


def test_json_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "x")
    write_json(tmp_path / "x", {"ä": [1, None]})
    assert read_json(tmp_path / "x") == {"ä": [1, None]}
    assert len(sha256(tmp_path / "x")) == 64


def test_the_nearest_right_name_is_offered() -> None:
    assert nearest("batch_sise", ["batch_size", "seq_len"]) == "; did you mean 'batch_size'?"
    assert nearest("zzz", ["batch_size"]) == ""


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(UserError, match=r"needs the package 'no_such_thing'.*pip install 'cleangpt\[wandb\]'"):
        require("no_such_thing.part", "wandb")
