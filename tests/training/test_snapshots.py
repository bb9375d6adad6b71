"""A snapshot gives back exactly what was put in, and a damaged one is passed over."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cleangpt.errors import UserError
from cleangpt.files import read_json, write_json
from cleangpt.training.snapshots import clean, list_snapshots, load_snapshot, newest_snapshot, save_snapshot

STATE = {
    "position": {"samples": 12, "time": 0.1 + 0.2},
    "model": {"a.weight": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8)},
    "nested": [{"x": torch.tensor(2.0, dtype=torch.float64)}, [1, None, "text", float("inf")]],
}


def assert_same(one: object, two: object) -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert isinstance(two, dict) and one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list):
        assert isinstance(two, list) and len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_snapshot(tmp_path, "mb000001", STATE, keep=2)
    assert_same(STATE, load_snapshot(tmp_path / "mb000001"))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for name in ("mb000001", "mb000002", "mb000002_b00030", "mb000003"):
        save_snapshot(tmp_path, name, STATE, keep=2)
    assert [path.name for path in list_snapshots(tmp_path)] == ["mb000003", "mb000002_b00030"]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "empty"])
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(tmp_path: Path, harm: str) -> None:
    for name in ("mb000001", "mb000002"):
        save_snapshot(tmp_path, name, STATE, keep=2)
    victim = tmp_path / "mb000002" / "tensors.safetensors"
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif harm == "cut":
        victim.write_bytes(content[:-1])
    elif harm == "remove":
        victim.unlink()
    elif harm == "manifest":
        (victim.parent / "manifest.json").write_text("{")
    else:
        victim.write_bytes(b"")
    path, complaints = newest_snapshot(tmp_path)
    assert path == tmp_path / "mb000001"
    assert len(complaints) == 1 and "mb000002 is damaged" in complaints[0]


def test_remains_of_an_interrupted_save_are_no_snapshot_and_are_removed(tmp_path: Path) -> None:
    save_snapshot(tmp_path, "mb000001", STATE, keep=2)
    (tmp_path / "mb000002.partial").mkdir()
    (tmp_path / "mb000002.partial" / "tensors.safetensors").write_bytes(b"half")
    assert newest_snapshot(tmp_path)[0] == tmp_path / "mb000001"
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mb000001"]


def test_a_newer_format_is_refused_in_one_line(tmp_path: Path) -> None:
    save_snapshot(tmp_path, "mb000001", STATE, keep=2)
    path = tmp_path / "mb000001" / "state.json"
    write_json(path, read_json(path) | {"format": 99})
    with pytest.raises(UserError, match="snapshot format 99; this version reads 1"):
        load_snapshot(tmp_path / "mb000001")


def test_an_empty_folder_has_no_snapshot(tmp_path: Path) -> None:
    assert newest_snapshot(tmp_path / "nowhere") == (None, [])


def test_saving_the_same_snapshot_again_replaces_it(tmp_path: Path) -> None:
    save_snapshot(tmp_path, "mb000001", STATE, keep=2)
    save_snapshot(tmp_path, "mb000001", {"x": torch.ones(2)}, keep=2)
    assert_same({"x": torch.ones(2)}, load_snapshot(tmp_path / "mb000001"))
    assert [path.name for path in tmp_path.iterdir()] == ["mb000001"]


def test_generators_come_back_where_they_stood() -> None:
    import random

    from cleangpt.training.device import RandomState

    state = RandomState(torch.device("cpu"))
    before = state.state_dict()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    state.load_state_dict(before)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first
