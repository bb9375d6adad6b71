"""Snapshots: everything needed to go on as if nothing had happened.

    snapshots/mb000012/              after 12 macro-batches; mb000012_b00034 is 34 batches into the next one
        shard_00000.safetensors …    the tensors that one process wrote, or its parts of them
        index.json                   every tensor by its path in the tree: dtype, shape, and which file has which part
        state.json                   the rest of the tree; a tensor's place holds {"tensor": path}
        manifest.json                sizes and checksums of all of these

The tree is what the trainer's parts return from `state_dict`. Paths and whole shapes are the same under every strategy,
so a snapshot may be loaded under another one and on another number of processes. Nothing is unpickled.
"""

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cleangpt.checkpoints.tensor_files import INDEX, copy_to_host, read_index, read_whole, write_whole
from cleangpt.config import SavingConfig
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import is_dtensor
from cleangpt.errors import UserError, parsing
from cleangpt.files import MANIFEST, PARTIAL, commit_folder, find_corruption, read_json, remove, write_json

FORMAT = 3


DAMAGED = ".damaged"


STATE = "state.json"


Write = Callable[[Path, Callable[[Mapping[str, Any]], None]], str]
"""Writes tensors into a folder, and calls a function with their files' entries for a manifest when they are on the
disk; returns why that could not be, in a few words, and an empty text where it could."""


def snapshot_name(macro_batch: int, batches: int = 0) -> str:
    """The folder of a snapshot `batches` batches after `macro_batch` whole macro-batches; names sort by time."""
    return f"mb{macro_batch:06d}" + (f"_b{batches:05d}" if batches else "")


# Saving --------------------------------------------------------------------------------------------------------------
class Snapshots:
    """Saves the snapshots of a run; all its processes do so together.

    With `saving.async_snapshots`, training pauses only while the tensors are copied to the host's memory. A thread
    writes the copy, over a process group of its own, so that its messages do not meet those of training. A process
    waits `timeout` seconds for the others to write theirs. What the disk refuses is told to `say`, at once and by the
    main process.
    """

    def __init__(
        self, folder: Path, config: SavingConfig, ranks: Ranks | None = None, timeout: float = 600.0,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.ranks, self.log = folder, config, ranks or Ranks(), log
        several, limit = self.ranks.world_size > 1, timedelta(seconds=timeout)
        self.group = dist.new_group(backend="gloo", timeout=limit) if several else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self.under_way: Future[str] | None = None
        self.longest = 0.0
        """Seconds that a save has taken at the most, from the call to the disk."""
        self.host: dict[Any, Tensor] = {}
        """The copy, kept for the next save: memory that is in use already is quicker to fill."""
        self.attempt = self.ranks.broadcast(secrets.token_hex(4))
        """Stands in the names of unfinished folders: a process of a dead run may still be writing to its own."""

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Saves `state` as it is now as the snapshot `name`, whole or not at all; then removes the oldest.

        Args:
            name: from `snapshot_name`.
            state: a tree of dicts, lists, numbers, texts and tensors, the same on every process but for the parts of
                sharded tensors; numbers and texts are taken from the main process.

        The one that is under way is waited for first; whether it is whole, `wait` tells before.
        """
        self.wait()
        began = time.monotonic()
        tensors: dict[str, Tensor] = {}
        tree = _split(state, "", tensors)
        write_tensors = self._prepared(tensors)
        self.under_way = self.thread.submit(self._write, name, tree, write_tensors)
        self.under_way.add_done_callback(lambda _: self._measure(began))
        if not self.config.async_snapshots:
            self.under_way.exception()

    def _prepared(self, tensors: dict[str, Tensor]) -> Write:
        """What writes the tensors, or the copy that is taken of them now."""
        if (group := self.group) is not None:
            from cleangpt.checkpoints.dcp import Parts, to_write, write_parts

            planner = Parts(to_write(tensors, self.ranks), self.host if self.config.async_snapshots else None)
            return lambda folder, complete: write_parts(folder, planner, self.ranks.rank, complete, group)
        if self.config.async_snapshots:
            copy_to_host(tensors, self.host)
            tensors = {name: self.host[name] for name in tensors}
        return lambda folder, complete: write_whole(folder, tensors, complete)

    def _measure(self, began: float) -> None:
        self.longest = max(self.longest, time.monotonic() - began)

    def wait(self) -> str:
        """Waits until the save under way is done; returns why it could not be, and an empty string where it is.

        The processes get the same answer. Older snapshots are as they were.
        """
        task, self.under_way = self.under_way, None
        return task.result() if task is not None else ""

    def close(self) -> None:
        """Lets the save under way finish, if it can: for the end of a run that has failed for another reason."""
        with contextlib.suppress(Exception):
            self.wait()
        self.thread.shutdown()

    def _write(self, name: str, tree: Any, write_tensors: Write) -> str:
        """What the thread does; returns what `wait` returns."""
        unfinished = self.folder / f"{name}.{self.attempt}{PARTIAL}"
        reason = write_tensors(unfinished, partial(self._complete, unfinished, name, tree))
        if reason and self.ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)  # it takes room that may be what is missing
            self.log(f"snapshot {name} could not be saved: {reason}; those before it are as they were")
        return reason

    def _complete(self, unfinished: Path, name: str, tree: Any, shards: Mapping[str, Any]) -> None:
        """The main process's part, when the shards are on the disk."""
        write_json(unfinished / STATE, {"format": FORMAT, "state": tree})
        commit_folder(unfinished, self.folder / name, shards)
        for old in list_snapshots(self.folder)[self.config.keep_snapshots :]:
            try:
                remove(old)
            except OSError as error:
                self.log(f"snapshot {old} could not be removed: {error}")


# Loading -------------------------------------------------------------------------------------------------------------
def list_snapshots(folder: Path) -> list[Path]:
    """The snapshots in `folder`, newest first, good or not."""
    names = [path for path in folder.glob("mb*") if re.fullmatch(r"mb\d+(_b\d+)?", path.name) and path.is_dir()]
    return sorted(names, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)


def newest_snapshot(folder: Path, ranks: Ranks | None = None) -> tuple[Path | None, list[str]]:
    """The newest snapshot that is whole, and a line about each newer one that is not.

    All `ranks` call this together and get the same answer; each reads some of the files.
    """
    ranks = ranks or Ranks()
    complaints: list[str] = []
    for path in ranks.broadcast(list_snapshots(folder)):
        wrong = next(filter(None, ranks.all_gather(_damage(path, ranks))), "")
        if not wrong:
            return path, complaints
        complaints.append(f"snapshot {path} is damaged ({wrong})")
    return None, complaints


def quarantine(folder: Path, newest: Path) -> None:
    """Renames the snapshots after the `newest` good one, which are damaged: they would count among those kept."""
    for path in list_snapshots(folder):
        if path == newest:
            break
        path.replace(path.with_name(f"{path.name}.{secrets.token_hex(4)}{DAMAGED}"))


def _damage(path: Path, ranks: Ranks) -> str:
    """`damage` of this process's part of a snapshot; a shard that does not belong to it counts as well."""
    if wrong := find_corruption(path, ranks.rank, ranks.world_size, (STATE, INDEX)):
        return wrong
    strange = {shard.name for shard in path.glob("shard_*")} - read_json(path / MANIFEST).keys()
    return f"{min(strange)} is not in {MANIFEST}" if strange else ""


def load_snapshot(
    path: Path, into: Mapping[str, Any] | None = None, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """The state that `Snapshots.save` saved.

    Args:
        path: the snapshot's folder.
        into: a tree like the saved one, or a part of it. Its tensors are filled in place, however they are sharded, and
            stand in the result; of those, a process reads only its parts. All other tensors are on the host, whole.
        group: the process group in which all call this together.

    Raises:
        UserError: the snapshot has a format that this version does not read, or tensors that do not fit `into`.
    """
    content = read_json(path / STATE)
    with parsing(path / STATE):
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has snapshot format {content.get('format')}; this version reads {FORMAT}")
    tensors: dict[str, Any] = {}
    _split(into or {}, "", tensors)
    read_shards(path, tensors, group, all_of_them=True)
    with parsing(path / STATE):
        state: dict[str, Any] = _join(content["state"], tensors)
    return state


def fill_tensors(path: Path, into: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Fills the tensors of `into`, a part of a tree like the saved one, in place; nothing else is read.

    Raises:
        UserError: the snapshot has no such tensors.
    """
    tensors: dict[str, Any] = {}
    _split(into, "", tensors)
    read_shards(path, tensors, group)


def saved_shapes(path: Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in a snapshot, by its path in the tree."""
    return {name: entry.shape for name, entry in read_index(path).items()}


def read_shards(
    folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None = None, all_of_them: bool = False
) -> None:
    """Fills `tensors`, each of the name in the index, in place, however they are sharded.

    Args:
        folder: where the shards are.
        tensors: to fill; a process reads only its parts.
        group: the process group in which all call this together.
        all_of_them: adds those that are not among them, whole and on the host.

    Raises:
        UserError: there is no such tensor, or one of another shape.
    """
    index = read_index(folder)
    if missing := tensors.keys() - index.keys():
        raise UserError(f"{folder} cannot be loaded: it has no {min(missing)}")
    for name, entry in index.items() if all_of_them else ():
        if name not in tensors:
            with parsing(folder / INDEX, RuntimeError):
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
    if group is None and not any(map(is_dtensor, tensors.values())):
        read_whole(folder, index, tensors)
        return
    from cleangpt.checkpoints.dcp import read_parts

    read_parts(folder, index, tensors, group)


# The tree ------------------------------------------------------------------------------------------------------------
def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Puts the tensors of a tree of dicts, lists and numbers into `tensors`; returns the tree with paths for them."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        return {key: _split(value, f"{path}/{key}" if path else str(key), tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split(value, f"{path}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Puts the tensors back."""
    if isinstance(tree, dict):
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        return {key: _join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree
