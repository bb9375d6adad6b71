"""Snapshots: everything needed to go on as if nothing had happened.

    snapshots/mb000012/            after 12 macro-batches; mb000012_b00034 is 34 batches into the next one
        tensors.safetensors        every tensor of the state, by its path in the tree
        state.json                 the rest of the tree; a tensor's place holds {"tensor": path}
        manifest.json              sizes and checksums of both

The tree is what the trainer's parts return from `state_dict`. Nothing is unpickled.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.files import PARTIAL, damage, read_json, seal, write_json

FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"


def snapshot_name(macro_batch: int, batches: int = 0) -> str:
    """The folder of a snapshot `batches` batches after `macro_batch` whole macro-batches; names sort by time."""
    return f"mb{macro_batch:06d}" + (f"_b{batches:05d}" if batches else "")


def save_snapshot(folder: Path, name: str, state: dict[str, Any], keep: int) -> None:
    """Writes `state` as the snapshot `name`, whole or not at all, then removes all but the newest `keep`."""
    partial = folder / (name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    save_file(tensors, partial / TENSORS)
    write_json(partial / STATE, {"format": FORMAT, "state": tree})
    seal(partial, folder / name)
    for old in list_snapshots(folder)[keep:]:
        shutil.rmtree(old)


def list_snapshots(folder: Path) -> list[Path]:
    """The snapshots in `folder`, newest first, good or not."""
    names = [path for path in folder.glob("mb*") if path.is_dir() and not path.name.endswith((PARTIAL, ".old"))]
    return sorted(names, key=lambda path: path.name, reverse=True)


def newest_snapshot(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest snapshot that is whole, and a line about each newer one that is not."""
    complaints: list[str] = []
    for path in list_snapshots(folder):
        if not (wrong := damage(path)):
            return path, complaints
        complaints.append(f"snapshot {path} is damaged ({wrong}); using the one before it")
    return None, complaints


def load_snapshot(path: Path) -> dict[str, Any]:
    """The state that `save_snapshot` wrote, with its tensors on the host.

    Raises:
        UserError: the snapshot has a format that this version does not read.
    """
    content = read_json(path / STATE)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has snapshot format {content.get('format')}; this version reads {FORMAT}")
    state: dict[str, Any] = _join(content["state"], load_file(path / TENSORS))
    return state


def clean(folder: Path) -> None:
    """Removes what an interrupted `save_snapshot` left behind."""
    for path in [*folder.glob("*" + PARTIAL), *folder.glob("*.old")]:
        shutil.rmtree(path)


def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a tree of dicts, lists and numbers into `tensors`, and says where they were."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(tree, dict):
        return {key: _split(value, f"{path}/{key}" if path else str(key), tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split(value, f"{path}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts the tensors back."""
    if isinstance(tree, dict):
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        return {key: _join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree
