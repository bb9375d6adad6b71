"""A snapshot gives back exactly what was put in, and a damaged one is passed over."""

import json
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cleangpt.checkpoints import tensor_files as shards
from cleangpt.checkpoints.snapshots import FORMAT, Snapshots, list_snapshots, load_snapshot, newest_snapshot, quarantine
from cleangpt.config import SavingConfig
from cleangpt.distributed.device import RandomState
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError
from cleangpt.files import find_corruption, read_json, recover_folder, write_json
from tests.checkpoints import sharded_process
from tests.forked import Command

STATE = {
    "position": {"samples": 12, "time": 0.1 + 0.2},
    "model": {"a.weight": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8)},
    "nothing": torch.zeros(0, 3),
    "nested": [{"x": torch.tensor(2.0, dtype=torch.float64)}, [1, None, "text", float("inf")]],
}


def save(folder: Path, name: str, state: dict[str, Any] = STATE, **fields: Any) -> None:
    snapshots = Snapshots(folder, SavingConfig(**fields))
    snapshots.save(name, state)
    snapshots.close()


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


# What is saved -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    save(tmp_path, "mb000001", async_snapshots=asynchronous)
    assert_same(STATE, load_snapshot(tmp_path / "mb000001"))


def test_tensors_are_filled_in_place_where_they_are(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    weight = torch.zeros(4, 3).t()  # not contiguous
    state = load_snapshot(tmp_path / "mb000001", {"model": {"a.weight": weight}})
    assert state["model"]["a.weight"].data_ptr() == weight.data_ptr()
    assert torch.equal(weight, STATE["model"]["a.weight"])
    assert_same(STATE, state)


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    with pytest.raises(
        UserError, match=r"mb000001 cannot be loaded: model/a.weight is \[3, 4\] there and \[3, 5\] here"
    ):
        load_snapshot(tmp_path / "mb000001", {"model": {"a.weight": torch.zeros(3, 5)}})
    with pytest.raises(UserError, match="mb000001 cannot be loaded: it has no model/c"):
        load_snapshot(tmp_path / "mb000001", {"model": {"c": torch.zeros(3)}})


def test_shards_are_safetensors_and_the_index_says_what_is_where(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    folder = tmp_path / "mb000001"
    tensors = load_file(folder / "shard_00000.safetensors")
    assert torch.equal(tensors["model/a.weight"], STATE["model"]["a.weight"])
    assert read_json(folder / "index.json")["model/a.weight"] == {
        "dtype": "float32", "shape": [3, 4],
        "parts": [{"file": "shard_00000.safetensors", "offset": [0, 0], "shape": [3, 4]}],
    }  # fmt: skip
    assert read_json(folder / "state.json")["state"]["position"] == STATE["position"]


def test_an_index_whose_parts_lie_nowhere_is_blamed_before_anyone_plans_with_it(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    path = tmp_path / "mb000001" / "index.json"
    index = read_json(path)
    index["model/a.weight"]["parts"][0]["offset"] = ["first", 0]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json is not what CleanGPT writes"):
        shards.read_index(path.parent)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for name in ("mb000001", "mb000002", "mb000002_b00030", "mb000003"):
        save(tmp_path, name, keep_snapshots=2)
    assert [path.name for path in list_snapshots(tmp_path)] == ["mb000003", "mb000002_b00030"]


# While training goes on ----------------------------------------------------------------------------------------------


class SlowDisk:
    """Writes a shard only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write, self.began, self.save_file = threading.Event(), threading.Event(), shards.save_file
        monkeypatch.setattr(shards, "save_file", self.write)

    def write(self, tensors: dict[str, torch.Tensor], path: Path, metadata: None) -> None:
        self.began.set()
        assert self.may_write.wait(60)
        self.save_file(tensors, path, metadata)


def test_the_snapshot_has_the_state_of_the_moment_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save too, whose copy takes the memory of the first one's."""
    disk, snapshots = SlowDisk(monkeypatch), Snapshots(tmp_path, SavingConfig())
    weight, losses = torch.zeros(1000), [0.5]
    for number in (1, 2):
        weight.fill_(number)
        snapshots.save(f"mb00000{number}", {"weight": weight, "losses": losses})
        weight.mul_(100)
        losses.append(number)
        assert disk.began.wait(60) and not (tmp_path / f"mb00000{number}").exists()
        disk.may_write.set()
        snapshots.wait()
        disk.may_write.clear()
    for number, told in ((1, [0.5]), (2, [0.5, 1])):
        state = load_snapshot(tmp_path / f"mb00000{number}")
        assert torch.equal(state["weight"], torch.full((1000,), float(number))) and state["losses"] == told
    snapshots.close()


def test_the_next_save_waits_for_the_one_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, snapshots = SlowDisk(monkeypatch), Snapshots(tmp_path, SavingConfig())
    snapshots.save("mb000001", STATE)
    assert disk.began.wait(60)
    threading.Timer(0.2, disk.may_write.set).start()
    snapshots.save("mb000002", STATE)
    assert find_corruption(tmp_path / "mb000001") == ""
    snapshots.close()
    assert find_corruption(tmp_path / "mb000002") == ""


def full_disk(tensors: dict[str, torch.Tensor], path: Path, metadata: None) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_at_once_and_the_next_save_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    snapshots = Snapshots(tmp_path, SavingConfig(keep_snapshots=1), log=said.append)
    snapshots.save("mb000001", STATE)
    assert snapshots.wait() == ""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full_disk)
        snapshots.save("mb000002", STATE)
        assert snapshots.wait() == "[Errno 28] No space left on device"
    assert said == [
        "snapshot mb000002 could not be saved: [Errno 28] No space left on device; earlier snapshots are intact"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["mb000001"]  # nothing half-written takes what room there is
    snapshots.save("mb000003", STATE)
    assert snapshots.wait() == ""
    assert newest_snapshot(tmp_path) == (tmp_path / "mb000003", [])
    snapshots.close()


def test_an_error_of_the_program_is_none_of_the_disk(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, SavingConfig())
    snapshots.save("mb000001", {"what": {1, 2}})  # no JSON
    with pytest.raises(TypeError, match="not JSON serializable"):
        snapshots.wait()
    snapshots.close()


def test_a_run_that_has_failed_is_not_told_of_a_second_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "save_file", full_disk)
    snapshots = Snapshots(tmp_path, SavingConfig())
    snapshots.save("mb000001", STATE)
    snapshots.close()
    assert list_snapshots(tmp_path) == []


# Several processes ---------------------------------------------------------------------------------------------------


def launch(layout: str, processes: int, folder: Path) -> None:
    """Saves the state of `sharded_process.py` under a layout, and loads there what others have saved."""
    running = [Command(partial(sharded_process.main, layout, rank, processes, folder)) for rank in range(processes)]
    codes = [process.wait() for process in running]
    assert not any(codes), [process.stderr for process in running]


def weights_alone(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a snapshot, loaded by one process."""
    weights: dict[str, torch.Tensor] = load_snapshot(path)["model"]
    return weights


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_reads_it(tmp_path: Path) -> None:
    launch("ddp", 2, tmp_path)
    folder = tmp_path / "ddp" / "mb000001"
    sizes = [path.stat().st_size for path in sorted(folder.glob("shard_*"))]
    assert len(sizes) == 2 and max(sizes) < 2 * min(sizes)
    torch.manual_seed(3)
    assert torch.equal(weights_alone(folder)["0.weight"], torch.nn.Linear(5, 14).weight)
    kept = [set(load_file(path)) for path in folder.glob("shard_*")]
    assert not kept[0] & kept[1] and kept[0] | kept[1] == set(read_json(folder / "index.json"))


@pytest.mark.slow
def test_a_snapshot_of_every_layout_is_read_by_every_other(tmp_path: Path) -> None:
    """Uneven cuts, empty parts, copies, two cuts of one dimension; in ten directions, and by one process."""
    for layout, processes in (("ddp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("fsdp_tp", 4)):
        launch(layout, processes, tmp_path)
    read = [weights_alone(path) for path in sorted(tmp_path.glob("*/mb000001"))]
    assert len(read) == 5
    for weights in read[1:]:
        assert_same(read[0], weights)
    cut = load_file(tmp_path / "fsdp" / "mb000001" / "shard_00000.safetensors")
    assert cut["model/0.weight"].shape == (4, 5)  # a process writes what it has


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "index.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(tmp_path: Path, harm: str, name: str) -> None:
    for snapshot in ("mb000001", "mb000002"):
        save(tmp_path, snapshot)
    victim = tmp_path / "mb000002" / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes({"flip": content, "cut": content[:-2], "empty": b""}[harm])
    path, complaints = newest_snapshot(tmp_path)
    assert path == tmp_path / "mb000001"
    assert len(complaints) == 1 and "mb000002 is corrupt" in complaints[0]
    assert name in complaints[0] or name == "manifest.json"


def test_a_shard_that_does_not_belong_to_a_snapshot_is_named(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    (tmp_path / "mb000001" / "shard_00007.safetensors").write_bytes(b"of another run")
    assert newest_snapshot(tmp_path) == (
        None,
        [f"snapshot {tmp_path / 'mb000001'} is corrupt (shard_00007.safetensors is not in manifest.json)"],
    )


def test_damaged_snapshots_do_not_count_among_those_kept(tmp_path: Path) -> None:
    """Saved after a good one that damaged ones followed, a snapshot would have been the oldest, and removed at once."""
    for name in ("mb000003", "mb000004", "mb000005"):
        save(tmp_path, name, keep_snapshots=3)
    for name in ("mb000004", "mb000005"):
        (tmp_path / name / "index.json").write_text("{}", encoding="utf-8")
    newest, _ = newest_snapshot(tmp_path)
    assert newest == tmp_path / "mb000003"
    quarantine(tmp_path, newest)
    save(tmp_path, "mb000003_b00002", keep_snapshots=2)
    assert [path.name for path in list_snapshots(tmp_path)] == ["mb000003_b00002", "mb000003"]
    assert len(list(tmp_path.glob("mb00000[45].*.corrupt"))) == 2  # perhaps not all is lost of them


def test_snapshots_are_in_order_however_long_the_run_is(tmp_path: Path) -> None:
    names = ["mb999999", "mb1000000", "mb1000000_b99999", "mb1000000_b100000"]
    for name in names:
        (tmp_path / name).mkdir()
    assert [path.name for path in list_snapshots(tmp_path)] == names[::-1]


def test_processes_look_for_damage_together(tmp_path: Path) -> None:
    """Each at its own files: between them, they find every file's."""
    save(tmp_path, "mb000001")
    folder = tmp_path / "mb000001"
    names = list(read_json(folder / "manifest.json"))
    assert len(names) == 3
    for number, name in enumerate(names):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        assert [bool(find_corruption(folder, rank, 2)) for rank in (0, 1)] == [number % 2 == 0, number % 2 == 1]
        (folder / name).write_bytes(content)


def test_remains_of_an_interrupted_save_are_no_snapshot_and_are_removed(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    (tmp_path / "mb000002.0123abcd.partial").mkdir()
    (tmp_path / "mb000002.0123abcd.partial" / "shard_00000.safetensors").write_bytes(b"half")
    assert newest_snapshot(tmp_path)[0] == tmp_path / "mb000001"
    recover_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mb000001"]


@pytest.mark.parametrize("number", [FORMAT + 1, FORMAT - 1, None])
def test_another_format_is_refused_in_one_line(number: int | None, tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    path = tmp_path / "mb000001" / "state.json"
    write_json(path, read_json(path) | {"format": number})
    with pytest.raises(UserError, match=f"^.* has snapshot format {number}; this version reads {FORMAT}; resume "):
        load_snapshot(tmp_path / "mb000001")


def test_an_empty_folder_has_no_snapshot(tmp_path: Path) -> None:
    assert newest_snapshot(tmp_path / "nowhere") == (None, [])


def test_saving_the_same_snapshot_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, "mb000001")
    save(tmp_path, "mb000001", {"x": torch.ones(2)})
    assert_same({"x": torch.ones(2)}, load_snapshot(tmp_path / "mb000001"))
    assert [path.name for path in tmp_path.iterdir()] == ["mb000001"]


def test_a_new_run_does_not_write_where_a_process_of_a_dead_one_may_still_write(tmp_path: Path) -> None:
    one, two = (Snapshots(tmp_path, SavingConfig()) for _ in range(2))
    assert one.attempt != two.attempt


def test_generators_come_back_where_they_stood() -> None:
    state = RandomState(torch.device("cpu"), Ranks())
    before = state.state_dict()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    state.load_state_dict(before)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first
