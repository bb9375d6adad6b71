"""Snapshots: everything needed to resume a run as if nothing had happened.

    snapshots/mb000012/              after 12 macro-batches; mb000012_b00034 is 34 batches into the next one
        shard_00000.safetensors …    the tensors that one process wrote, or its slices of them
        index.json                   every tensor by its path in the state: dtype, full shape, slices and their files
        state.json                   the rest of the state, with {"tensor": path} in place of each tensor, and
                                 {"float": "nan"} for a number that JSON does not have
        manifest.json                sizes and checksums of all of these

The state is a tree of the `state_dict`s of a run's parts. Paths and full shapes do not depend on the parallel strategy,
so a snapshot can be loaded under another strategy and on another number of processes. Nothing is unpickled.
"""

import contextlib
import math
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

from cleangpt.checkpoints.tensor_files import (
    INDEX,
    copy_to_host,
    read_full_tensors,
    read_index,
    write_full_tensors,
)
from cleangpt.config import SavingConfig
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import is_dtensor
from cleangpt.errors import UserError, parsing
from cleangpt.files import MANIFEST, PARTIAL, commit_folder, find_corruption, read_json, remove_folder, write_json

FORMAT = 4


CORRUPT = ".corrupt"


STATE = "state.json"


WriteTensors = Callable[[Path, Callable[[Mapping[str, Any]], None]], str]
"""Writes tensors into a folder, and calls a function with the manifest entries of their files once these are fsynced;
returns why that failed, or an empty string."""


def snapshot_name(macro_batch: int, batches: int = 0) -> str:
    """The name of a snapshot `batches` batches after `macro_batch` complete macro-batches; names sort by time."""
    return f"mb{macro_batch:06d}" + (f"_b{batches:05d}" if batches else "")


# Saving --------------------------------------------------------------------------------------------------------------
class Snapshots:
    """Saves the snapshots of a run; its methods are collectives.

    With `saving.async_snapshots`, training pauses only while the tensors are copied to host memory. A thread writes the
    copy, with a separate process group, so that its collectives do not mix with those of training. A process waits
    `timeout` seconds for the others to write their shards. The main process logs a failed save at once.
    """

    def __init__(
        self, folder: Path, config: SavingConfig, ranks: Ranks | None = None, timeout: float = 600.0,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.ranks, self.log = folder, config, ranks or Ranks(), log
        several, limit = self.ranks.world_size > 1, timedelta(seconds=timeout)
        self.group = dist.new_group(backend="gloo", timeout=limit) if several else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self.pending: Future[str] | None = None
        """The save in progress."""
        self.longest_save = 0.0
        """Duration of the slowest save in seconds, from the call until it was on disk."""
        self.host: dict[Any, Tensor] = {}
        """The copy of the tensors, reused for the next save, since mapped memory is faster to fill."""
        self.attempt = self.ranks.broadcast(secrets.token_hex(4))
        """Part of the names of unfinished folders, since a process of a killed run may still be writing to its own."""

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Saves the current `state` as the snapshot `name`, atomically; then removes the oldest snapshots.

        Waits for the save in progress first; call `wait` before to learn whether that one succeeded.

        Args:
            name: from `snapshot_name`.
            state: a tree of dicts, lists, numbers, strings and tensors, the same on every process but for the shards of
                sharded tensors; numbers and strings are taken from the main process.
        """
        self.wait()
        began = time.monotonic()
        tensors: dict[str, Tensor] = {}
        tree = _flatten(state, "", tensors)
        write_tensors = self._prepare(tensors)
        self.pending = self.thread.submit(self._write, name, tree, write_tensors)
        self.pending.add_done_callback(lambda _: self._measure(began))
        if not self.config.async_snapshots:
            self.pending.exception()

    def _prepare(self, tensors: dict[str, Tensor]) -> WriteTensors:
        """Copies the tensors to the host if saving is asynchronous; returns the function that writes them."""
        if (group := self.group) is not None:
            from cleangpt.checkpoints.dcp import ShardPlanner, tensors_to_write, write_shards

            host = self.host if self.config.async_snapshots else None
            planner = ShardPlanner(tensors_to_write(tensors, self.ranks), host)
            return lambda folder, complete: write_shards(folder, planner, self.ranks.rank, complete, group)
        if self.config.async_snapshots:
            copy_to_host(tensors, self.host)
            tensors = {name: self.host[name] for name in tensors}
        return lambda folder, complete: write_full_tensors(folder, tensors, complete)

    def _measure(self, began: float) -> None:
        self.longest_save = max(self.longest_save, time.monotonic() - began)

    def wait(self) -> str:
        """Waits for the save in progress; returns why it failed, or an empty string, the same on every process.

        A save that fails leaves older snapshots as they were.
        """
        task, self.pending = self.pending, None
        return task.result() if task is not None else ""

    def close(self) -> None:
        """Lets the save in progress finish, ignoring its errors: the run has ended, possibly with another error."""
        with contextlib.suppress(Exception):
            self.wait()
        self.thread.shutdown()

    def _write(self, name: str, tree: Any, write_tensors: WriteTensors) -> str:
        """Runs in the thread; returns what `wait` returns."""
        unfinished = self.folder / f"{name}.{self.attempt}{PARTIAL}"
        reason = write_tensors(unfinished, partial(self._complete, unfinished, name, tree))
        if reason and self.ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)  # frees space on a full disk
            self.log(f"snapshot {name} could not be saved: {reason}; earlier snapshots are intact")
        return reason

    def _complete(self, unfinished: Path, name: str, tree: Any, shards: Mapping[str, Any]) -> None:
        """Runs on the main process once the shards are fsynced: commits the folder, removes old snapshots."""
        write_json(unfinished / STATE, {"format": FORMAT, "state": tree})
        commit_folder(unfinished, self.folder / name, shards)
        for old in list_snapshots(self.folder)[self.config.keep_snapshots :]:
            try:
                remove_folder(old)
            except OSError as error:
                self.log(f"snapshot {old} could not be removed: {error}")


# Loading -------------------------------------------------------------------------------------------------------------
def list_snapshots(folder: Path) -> list[Path]:
    """The snapshots in `folder`, newest first, intact or not."""
    names = [path for path in folder.glob("mb*") if re.fullmatch(r"mb\d+(_b\d+)?", path.name) and path.is_dir()]
    return sorted(names, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)


def newest_snapshot(folder: Path, ranks: Ranks | None = None) -> tuple[Path | None, list[str]]:
    """The newest intact snapshot, and a line about each newer one that is corrupt.

    A collective: each process verifies some of the files, and all return the same.
    """
    ranks = ranks or Ranks()
    problems: list[str] = []
    for path in ranks.broadcast(list_snapshots(folder)):
        reason = next(filter(None, ranks.all_gather(_find_corruption(path, ranks))), "")
        if not reason:
            return path, problems
        problems.append(f"snapshot {path} is corrupt ({reason})")
    return None, problems


def quarantine(folder: Path, newest: Path) -> None:
    """Renames the corrupt snapshots newer than the `newest` intact one, so that they do not count as kept."""
    for path in list_snapshots(folder):
        if path == newest:
            break
        path.replace(path.with_name(f"{path.name}.{secrets.token_hex(4)}{CORRUPT}"))


def _find_corruption(path: Path, ranks: Ranks) -> str:
    """`find_corruption` in this process's share of the files; also reports shards missing from the manifest."""
    if reason := find_corruption(path, ranks.rank, ranks.world_size, (STATE, INDEX)):
        return reason
    unknown = {shard.name for shard in path.glob("shard_*")} - read_json(path / MANIFEST).keys()
    return f"{min(unknown)} is not in {MANIFEST}" if unknown else ""


def load_snapshot(
    path: Path, into: Mapping[str, Any] | None = None, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Loads the state that `Snapshots.save` saved; a collective over `group`.

    Args:
        path: the snapshot's folder.
        into: a tree like the saved one, or a part of it. Its tensors, sharded or not, are filled in place and appear in
            the result; each process reads only its own shards. All other tensors are full, on the host.
        group: a process group; None: the default one.

    Raises:
        UserError: the snapshot has a format that this version does not read, or its tensors do not match `into`.
    """
    content = read_json(path / STATE)
    with parsing(path / STATE):
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path} has snapshot format {content.get('format')}; this version reads {FORMAT}; resume the "
                "run with the version that wrote it, or start another whose init_from is a checkpoint of this one"
            )
    tensors: dict[str, Any] = {}
    _flatten(into or {}, "", tensors)
    _read_tensors(path, tensors, group, read_all=True)
    with parsing(path / STATE):
        state: dict[str, Any] = _unflatten(content["state"], tensors)
    return state


def fill_tensors(path: Path, into: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Fills the tensors of `into`, a part of a tree like the saved one, in place, and reads nothing else.

    Raises:
        UserError: the snapshot has no such tensors.
    """
    tensors: dict[str, Any] = {}
    _flatten(into, "", tensors)
    _read_tensors(path, tensors, group)


def saved_shapes(path: Path) -> dict[str, torch.Size]:
    """The full shape of every tensor in a snapshot, by its path in the state."""
    return {name: entry.shape for name, entry in read_index(path).items()}


def _read_tensors(
    folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None = None, read_all: bool = False
) -> None:
    """Fills `tensors`, named as in the index, in place, sharded or not; `read_all` adds the others, full, on the host.

    Raises:
        UserError: there is no such tensor, or one of another shape.
    """
    index = read_index(folder)
    if missing := tensors.keys() - index.keys():
        raise UserError(f"{folder} cannot be loaded: it has no {min(missing)}")
    for name, entry in index.items() if read_all else ():
        if name not in tensors:
            with parsing(folder / INDEX, RuntimeError):
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
    if group is None and not any(map(is_dtensor, tensors.values())):
        read_full_tensors(folder, index, tensors)
        return
    from cleangpt.checkpoints.dcp import read_shards

    read_shards(folder, index, tensors, group)


# The state as a tree -------------------------------------------------------------------------------------------------
def _flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Collects the tensors of a tree in `tensors`, by path; returns the tree as strict JSON, with the paths instead."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        return {key: _flatten(value, f"{path}/{key}" if path else str(key), tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_flatten(value, f"{path}/{index}", tensors) for index, value in enumerate(tree)]
    return {"float": str(tree)} if isinstance(tree, float) and not math.isfinite(tree) else tree


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_flatten`."""
    if isinstance(tree, dict):
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        if set(tree) == {"float"}:
            return float(tree["float"])
        return {key: _unflatten(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    return tree
